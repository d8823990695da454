"""The asking half of nixl: one link's agent, pulling and writing by itself, or asking the owner to push."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping

import numpy as np

from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import Corrupt, FleetError, PeerGone
from vllm_fleet.fabric.contract import KVPool, TransferError
from vllm_fleet.fabric.control import CHECK_RUNS_MAX, GRACE_S, IDLE_S, RECONNECT_S, Control, Stop
from vllm_fleet.fabric.owner import encode_runs
from vllm_fleet.fabric.pacing import PIECE_BYTES_MIN, Pacer, Pause
from vllm_fleet.fabric.plan import BlockCopyPlan
from vllm_fleet.fabric.transports.nixl_agent import Agent, Batch
from vllm_fleet.fabric.transports.nixl_handle import NixlDetails, can_pull, encode, machine_facts
from vllm_fleet.fabric.work import check_bounds
from vllm_fleet.wire import fabric as wire
from vllm_fleet.wire.fabric import PoolHandle

IN_FLIGHT_MAX = 2
"""Pieces under way at once, so that the wire has work while one is ended and the next begun."""

_RECONNECT_SETTING = "fabric.control.RECONNECT_S"


class NixlCopier:
    """See fabric/work.py. The agent is ended, and another one made for the next transfer, whenever something it
    started may still be under way when it must not be."""

    def __init__(
        self,
        control: Control,
        peer: PoolHandle,
        theirs: NixlDetails,
        pool: KVPool,
        describe: Callable[[Agent, KVPool], NixlDetails],
        ucx: Mapping[str, str],
    ) -> None:
        self._control = control
        self._theirs = theirs
        self._pool = pool
        self._describe = describe
        self._ucx = ucx
        self._own_addresses = np.array([region.address for region in pool.regions], np.int64)
        self._their_addresses = np.array(theirs.addresses, np.int64)
        self._own_bytes = np.array(pool.sizes, np.int64)
        self._their_bytes = np.array(peer.region_bytes, np.int64)
        self._pull = can_pull(machine_facts(ucx), theirs.facts)
        self._pacer = Pacer()
        self._agent: Agent | None = None
        self._name = ""

    def open(self, deadline: Deadline) -> Agent:
        """Reach the owner on both ways and prove NIXL's with the owner's nonce. Raises FleetError."""
        cancelled = threading.Event()
        self._control.open(deadline)
        agent = Agent(self._pool, self._ucx)
        try:
            self._name = agent.load(self._theirs.metadata)
            if self._pull:
                self._pull_nonce(agent, deadline)
            else:
                handle = PoolHandle(
                    "nixl", self._control.pool, self._pool.sizes, encode(self._describe(agent, self._pool))
                )
                self._control.check(wire.NixlJoin(self._control.pool, handle), cancelled)
            if agent.landing.tobytes() != self._theirs.nonce:
                raise PeerGone(f"{self._control.peer} does not hold what it registered")
        except BaseException:
            agent.destroy()
            self._control.close()
            raise
        self._agent = agent
        return agent

    def _pull_nonce(self, agent: Agent, deadline: Deadline) -> None:
        batch, pause = agent.start_nonce(self._name, self._theirs.nonce_address, write=False), Pause()
        try:
            while not batch.done():
                if pause():
                    deadline.check(self._control.peer, "a first read by nixl")
                    self._control.check_alive()
        finally:
            batch.release()

    def read(self, plan: BlockCopyPlan, cancelled: threading.Event) -> None:
        if not len(plan):
            return
        check_bounds(plan, self._their_bytes, self._own_bytes)
        if self._pull:
            self._carry_out(self._move, plan, False, cancelled)
        else:
            self._carry_out(self._ask_push, plan, False, cancelled)

    def write(self, plan: BlockCopyPlan, cancelled: threading.Event) -> None:
        if not len(plan):
            return
        check_bounds(plan, self._own_bytes, self._their_bytes)
        self._carry_out(self._move, plan, True, cancelled)

    def _carry_out(
        self,
        copy: Callable[[Agent, BlockCopyPlan, bool, threading.Event], None],
        plan: BlockCopyPlan,
        write: bool,
        cancelled: threading.Event,
    ) -> None:
        agent = self._agent
        if agent is None:
            agent = self.open(Deadline.after(RECONNECT_S, _RECONNECT_SETTING))
        try:
            copy(agent, plan.split(PIECE_BYTES_MIN), write, cancelled)
            if not cancelled.is_set():
                self._control.stands(cancelled)
        except FleetError:
            if not self._control.is_open:
                self._lose_agent()
            raise

    def _move(self, agent: Agent, plan: BlockCopyPlan, write: bool, cancelled: threading.Event) -> None:
        """Pull, or write: NIXL moves the runs without the owner's help."""
        own = self._own_addresses[plan.region] + (plan.source if write else plan.target)
        theirs = self._their_addresses[plan.region] + (plan.target if write else plan.source)
        under_way: deque[tuple[Batch, int, float]] = deque()
        try:
            for part in self._control.permit(wire.NixlCheck, plan, write=write, cancelled=cancelled):
                for piece in self._pacer.pieces(plan.nbytes, part):
                    if cancelled.is_set():
                        break
                    began, nbytes = time.monotonic(), plan.nbytes[piece]
                    batch = agent.start(
                        self._name,
                        self._theirs.device,
                        write=write,
                        own=own[piece],
                        theirs=theirs[piece],
                        nbytes=nbytes,
                    )
                    under_way.append((batch, int(nbytes.sum()), began))
                    if len(under_way) == IN_FLIGHT_MAX:
                        self._end_first(under_way, cancelled)
            while under_way:
                self._end_first(under_way, cancelled)
        except FleetError as error:
            for batch, _, _ in under_way:
                batch.release()
            if under_way or not isinstance(error, TransferError):
                self._lose_agent()
            raise

    def _end_first(self, under_way: deque[tuple[Batch, int, float]], cancelled: threading.Event) -> None:
        """Wait for the oldest piece; it stays in the list when that fails."""
        batch, nbytes, began = under_way[0]
        pause, stop_at = Pause(), None
        while not batch.done():
            now = time.monotonic()
            if cancelled.is_set():
                stop_at = now + GRACE_S if stop_at is None else stop_at
                if now >= stop_at:
                    raise Stop("the transfer was cancelled")
            if pause():
                self._control.check_alive()
                if now >= began + IDLE_S:
                    raise TransferError(f"nixl moved nothing to or from {self._control.peer} for {IDLE_S:.0f} s")
        under_way.popleft()
        batch.release()
        self._pacer.took(nbytes, time.monotonic() - began)

    def _ask_push(self, agent: Agent, plan: BlockCopyPlan, write: bool, cancelled: threading.Event) -> None:
        """Let the owner write the runs into our pool."""
        for start in range(0, len(plan), CHECK_RUNS_MAX):
            for piece in self._pacer.pieces(plan.nbytes, slice(start, start + CHECK_RUNS_MAX)):
                if cancelled.is_set():
                    return
                runs = encode_runs(plan.region[piece], plan.source[piece], plan.nbytes[piece])
                targets = np.ascontiguousarray(plan.target[piece], "<i8").tobytes()
                began, wanted = time.monotonic(), int(plan.nbytes[piece].sum())
                question = wire.NixlPush(plan.grant, self._control.pool, runs, targets)
                if self._control.ask(question, cancelled, GRACE_S) != wire.Moved(wanted):
                    self._control.close()
                    raise Corrupt(f"{self._control.peer} did not push the {wanted} bytes asked for")
                self._pacer.took(wanted, time.monotonic() - began)

    def _lose_agent(self) -> None:
        """End the agent: whatever it or a push of the owner still had under way is not written any more."""
        agent, self._agent = self._agent, None
        self._control.close()
        if agent is not None:
            agent.destroy()

    def interrupt(self) -> None:
        return  # every wait looks at the event many times a second

    def close(self) -> None:
        self._lose_agent()
