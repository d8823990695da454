"""The scheduler side's prefill half: requests whose KV is handed over, while they are computed or when they are done.

A request with a StreamTicket: growing (each step's blocks and progress go to the workers) -> held when it finishes, or
revoked when it loses its blocks. A request without: held when it finishes, and its answer carries a Ticket.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_fleet.connector.jobs import GrowJob, HoldJob
from vllm_fleet.connector.meta import StepMetadata
from vllm_fleet.connector.versions import request_adapter
from vllm_fleet.core import limits
from vllm_fleet.core.errors import BadRequest
from vllm_fleet.wire.ticket import StreamTicket, WorkerAddress, prompt_digest

HELD_STATUSES = (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)


@dataclass
class _Stream:
    request: Request
    transfer: str
    prompt: bytes
    begun: bool = False
    revoked: bool = False


@dataclass(frozen=True)
class Held:
    """A finished request whose blocks stay."""

    transfer: str
    tokens: int
    prompt: bytes
    blocks: tuple[int, ...]


def request_digest(request: Request, tokens: int) -> bytes:
    """What identifies the KV of a request's first ``tokens`` tokens."""
    assert request.prompt_token_ids is not None
    return prompt_digest(request.prompt_token_ids[:tokens], request.cache_salt, request_adapter(request))


class PrefillSide:
    """All requests of this engine that others take the KV of."""

    def __init__(self, engine: str, block_tokens: int) -> None:
        self._engine = engine
        self._block_tokens = block_tokens
        self._streams: dict[str, _Stream] = {}
        self._used: dict[str, None] = {}
        self._jobs = StepMetadata()

    def on_stream(self, request: Request, ticket: StreamTicket, workers: tuple[WorkerAddress, ...]) -> None:
        """A request came whose KV a decode instance takes while it is computed.

        Raises:
            BadRequest: the ticket is another engine's, was used before, or the prompt has no tokens.
        """
        if ticket.engine != self._engine or ticket.workers != workers:
            raise BadRequest(f"the ticket is for engine {ticket.engine}, this is {self._engine}")
        if ticket.transfer in self._used:
            raise BadRequest("the ticket was used before")
        if not request.prompt_token_ids:
            raise BadRequest("the prompt has no tokens")
        while len(self._used) >= limits.PAST_TRANSFERS_MAX:
            del self._used[next(iter(self._used))]
        self._used[ticket.transfer] = None
        digest = request_digest(request, len(request.prompt_token_ids))
        self._streams[request.request_id] = _Stream(request, ticket.transfer, digest)

    def on_finished(self, request: Request, blocks: list[int], new_id: str | None) -> Held | None:
        """A request that asked to be held ended; what stays of it.

        Args:
            new_id: the transfer of a sequential handoff; None: it came with a StreamTicket.
        """
        stream = self._streams.pop(request.request_id, None)
        transfer = new_id if stream is None else stream.transfer
        if transfer is None or (stream is not None and stream.revoked):
            return None
        tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
        whole = request.status in HELD_STATUSES and tokens > 0 and blocks and request.prompt_token_ids is not None
        if not whole or (stream is not None and tokens < request.num_prompt_tokens):
            if stream is not None:
                self._jobs.revoked.append(transfer)
            return None
        kept = tuple(blocks[: -(-tokens // self._block_tokens)])
        prompt = stream.prompt if stream is not None else request_digest(request, tokens)
        self._jobs.holds.append(HoldJob(transfer, request.request_id, prompt, kept, tokens))
        return Held(transfer, tokens, prompt, kept)

    def take_step(self, output: SchedulerOutput, step: StepMetadata) -> None:
        """Add the jobs of the workers' next step."""
        jobs, self._jobs = self._jobs, StepMetadata()
        step.holds, step.revoked = jobs.holds, jobs.revoked
        if not self._streams:
            return
        cached = output.scheduled_cached_reqs
        # vLLM may preempt and resume a request between two steps (reset_prefix_cache with reset_running_requests); its
        # second model runner is told of resumed requests as of new ones (v1/core/sched/scheduler.py)
        again = {new.req_id for new in output.scheduled_new_reqs} | cached.resumed_req_ids
        for name, stream in self._streams.items():
            anew = stream.request.status == RequestStatus.PREEMPTED or name in again
            if stream.begun and anew and not stream.revoked:
                stream.revoked = True  # it will be computed anew, in other blocks
                step.revoked.append(stream.transfer)
        for new in output.scheduled_new_reqs:
            self._grow(step, output, new.req_id, new.num_computed_tokens, new.block_ids[0])
        for name, done, blocks in zip(cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True):
            self._grow(step, output, name, done, blocks[0] if blocks is not None else ())

    @property
    def has_jobs(self) -> bool:
        """Whether jobs wait for a step."""
        return bool(self._jobs.holds or self._jobs.revoked)

    def _grow(self, step: StepMetadata, output: SchedulerOutput, name: str, done: int, blocks: Any) -> None:
        stream = self._streams.get(name)
        if stream is None or stream.revoked:
            return
        stream.begun = True
        ready = min(done + output.num_scheduled_tokens[name], stream.request.num_prompt_tokens)
        queued_s = max(0.0, time.time() - stream.request.arrival_time)
        step.grows.append(GrowJob(stream.transfer, name, stream.prompt, tuple(blocks), ready, queued_s))
