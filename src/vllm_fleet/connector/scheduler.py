"""The connector's scheduler side: which requests hold, load or give up KV. Runs on the engine's thread; no I/O.

One request on prefill (prefill.py): computed -> held (its blocks stay) -> vLLM frees them when every worker reports
that the pin ended. One request on decode: wanted (a valid ticket came with it) -> loading (blocks allocated) ->
loaded | recomputed; or wanted -> local (nothing left to load) | dropped; each wanted transfer that is not loaded is
given up explicitly.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from vllm_fleet.connector.choice import Choice
from vllm_fleet.connector.jobs import LoadJob, ReleaseJob
from vllm_fleet.connector.meta import StepMetadata
from vllm_fleet.connector.prefill import PrefillSide, request_digest
from vllm_fleet.connector.stats import FleetStats
from vllm_fleet.core import log
from vllm_fleet.core.env import Env
from vllm_fleet.core.errors import BadRequest, FleetError
from vllm_fleet.wire.control import Load
from vllm_fleet.wire.ticket import (
    FIELD,
    StreamTicket,
    Ticket,
    WorkerAddress,
    asks_to_hold,
    asks_to_load,
    transfer_params,
    unseal,
)


@dataclass
class _Wanted:
    """A transfer that a request's prompt can be loaded by."""

    transfer: str
    engine: str
    workers: tuple[WorkerAddress, ...]
    prompt: bytes
    tokens: int
    streamed: bool
    declined: bool | None = None
    """Whether computing is sooner; None: not asked yet."""

    @property
    def peer(self) -> str:
        return f"{self.workers[0].host}:{self.workers[0].port}"


@dataclass
class _Load:
    blocks: frozenset[int]
    failed: bool = False


class SchedulerSide:
    """State of all requests that hand over or take KV."""

    def __init__(self, *, token: bytes, engine: str, block_tokens: int, env: Env, quicker: bool = True) -> None:
        self.workers: tuple[WorkerAddress, ...] = ()
        self.outcomes: Counter[str] = Counter()
        self._token = token
        self._engine = engine
        self._block_tokens = block_tokens
        self._env = env
        self._prefill = PrefillSide(engine, block_tokens)
        self._wanted: dict[str, _Wanted] = {}
        self._loading: dict[str, _Load] = {}
        self._unfinished: set[str] = set()
        self._held: set[str] = set()
        self._next = StepMetadata()
        self._choice = Choice()
        self._quicker = quicker
        self._step: tuple[int, float] | None = None

    # Decode ---------------------------------------------------------------------------------------------------------

    def on_new_request(self, request: Request) -> None:
        """Look at the ticket, if one came. Anything that is not ours is ignored: the prompt is computed here."""
        self._unfinished.add(request.request_id)
        params = request.kv_transfer_params
        if params is None or not (asks_to_load(params) or (asks_to_hold(params) and FIELD in params)):
            return
        try:
            ticket = unseal(params.get(FIELD), self._token)
            if asks_to_load(params):
                self._want(request, ticket)
            elif isinstance(ticket, StreamTicket):
                self._prefill.on_stream(request, ticket, self.workers)
        except FleetError as error:
            self.outcomes["refused"] += 1
            log.warn("handoff.refused", request=request.request_id, reason=str(error))

    def _want(self, request: Request, ticket: Ticket | StreamTicket) -> None:
        token_ids = request.prompt_token_ids or []
        tokens = ticket.tokens if isinstance(ticket, Ticket) else len(token_ids)
        if not 0 < tokens <= len(token_ids):
            self._give_up(ticket)
            raise BadRequest(f"the ticket is for a prompt of {tokens} tokens, this one has {len(token_ids)}")
        digest = request_digest(request, tokens)
        if isinstance(ticket, Ticket) and digest != ticket.prompt:
            self._give_up(ticket)
            raise BadRequest("the ticket is for another prompt")
        self._wanted[request.request_id] = _Wanted(
            ticket.transfer, ticket.engine, ticket.workers, digest, tokens, isinstance(ticket, StreamTicket)
        )

    def matched_tokens(self, request: Request, local_tokens: int) -> tuple[int, bool]:
        """Tokens that can be loaded beyond ``local_tokens``, and whether asynchronously. Free of side effects."""
        ticket = self._wanted.get(request.request_id)
        if ticket is None:
            return 0, False
        tokens = min(ticket.tokens, request.num_tokens) - local_tokens
        if ticket.declined is None:
            ticket.declined = self._quicker and not self._choice.loads(ticket.peer, tokens)
        if tokens <= 1 or ticket.declined:  # vLLM computes the last token itself in any case
            return 0, False
        return tokens, True

    def on_allocated(self, request: Request, blocks: list[int], external_tokens: int) -> None:
        """Blocks of the whole request so far are allocated; ``external_tokens`` of its tokens are to be loaded."""
        ticket = self._wanted.pop(request.request_id, None)
        if ticket is None:
            return
        if external_tokens == 0:
            self.outcomes["computed" if ticket.declined else "local"] += 1
            self._give_up(ticket)
            return
        local_tokens = min(ticket.tokens, request.num_tokens) - external_tokens
        skip = local_tokens // self._block_tokens
        stop = -(-ticket.tokens // self._block_tokens)
        targets = tuple(blocks[skip:stop])
        self._loading[request.request_id] = _Load(frozenset(targets))
        self._next.loads.append(
            LoadJob(
                ticket.transfer,
                request.request_id,
                ticket.workers,
                ticket.engine,
                ticket.prompt,
                ticket.tokens,
                targets,
                skip,
                ticket.streamed,
                max(0.0, time.time() - request.arrival_time),
            )
        )

    def on_output(self, output: KVConnectorOutput) -> None:
        """Count how loads ended, and forget what is not held any more; the workers have reported."""
        self._held.difference_update(output.finished_sending or ())
        stats = output.kv_connector_stats
        if isinstance(stats, FleetStats):
            for _, _, _, wait_s, whole_s, peer, tokens in stats.data["loads"]:
                self._choice.loaded(peer, tokens, whole_s - wait_s)
        for load in self._loading.values():
            load.failed |= not load.blocks.isdisjoint(output.invalid_block_ids)
        for request_id in output.finished_recving or ():
            ended = self._loading.pop(request_id, None)
            if ended is not None:
                self.outcomes["recomputed" if ended.failed else "loaded"] += 1

    # Prefill and the end of every request ---------------------------------------------------------------------------

    def on_finished(self, request: Request, blocks: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Whether vLLM keeps the blocks, and what the answer's kv_transfer_params say."""
        self._unfinished.discard(request.request_id)
        ticket = self._wanted.pop(request.request_id, None)
        if ticket is not None:
            self.outcomes["dropped"] += 1
            self._give_up(ticket)
        if request.request_id in self._loading:
            self._next.cancels.append(request.request_id)
            return False, None
        params = request.kv_transfer_params
        if params is None or not asks_to_hold(params) or not self.workers:
            return False, None
        streamed = FIELD in params
        held = self._prefill.on_finished(request, blocks, None if streamed else self._env.new_id())
        if held is None:
            return False, None
        self.outcomes["held"] += 1
        self._held.add(request.request_id)
        if streamed:
            return True, None
        made = Ticket(held.transfer, self._engine, held.tokens, held.prompt, self.workers)
        return True, transfer_params(made, self._token, request_id=request.request_id, block_ids=[held.blocks])

    # Every step -----------------------------------------------------------------------------------------------------

    def take_step(self, output: SchedulerOutput) -> StepMetadata:
        """The jobs for the workers' next step."""
        step, self._next = self._next, StepMetadata()
        self._prefill.take_step(output, step)
        step.idle = output.total_num_scheduled_tokens == 0
        now = self._env.now()
        if self._step is not None:
            self._choice.computed(self._step[0], now - self._step[1])
        self._step = None if step.idle else (output.total_num_scheduled_tokens, now)
        return step

    @property
    def has_jobs(self) -> bool:
        """Whether jobs wait for a step, though no request may need one."""
        step = self._next
        return bool(step.loads or step.releases or step.cancels) or self._prefill.has_jobs

    def load(self) -> Load:
        """How busy this engine is. Any thread may ask."""
        return Load(len(self._unfinished), len(self._held))

    def take_outcomes(self) -> dict[str, int]:
        """Outcomes counted since the last call."""
        taken, self.outcomes = dict(self.outcomes), Counter()
        return taken

    def thresholds(self) -> dict[str, int]:
        """For each peer known well enough: how many tokens are computed here sooner than loaded."""
        found = {peer: self._choice.below(peer) for peer in self._choice.peers}
        return {peer: below for peer, below in found.items() if below is not None}

    def _give_up(self, ticket: Ticket | StreamTicket | _Wanted) -> None:
        self._next.releases.append(ReleaseJob(ticket.transfer, ticket.workers))
