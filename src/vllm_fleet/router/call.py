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
