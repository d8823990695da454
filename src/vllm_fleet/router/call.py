"""A client's request, as it came in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vllm_fleet.core.deadline import Deadline
from vllm_fleet.router.openai import GenerateRequest
from vllm_fleet.router.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Call:
    """One request, and what is known of it outside its body."""

    request: GenerateRequest
    headers: Mapping[str, str]
    """Looked up in any case."""
    request_id: str
    began: float
    deadline: Deadline
    timeline: Timeline
    key: str = ""
    """Whose turn it takes in the queue: the name of its API key. Empty: told by its Authorization header."""

    @property
    def inner_id(self) -> str:
        """Its X-Request-Id at instances. Never one that a client chose: vLLM ends every request of an id together when
        one of them is aborted (v1/engine/output_processor.py, external_req_ids), so two clients with one id would
        cancel each other.
        """
        return self.timeline.inner_id or self.request_id
