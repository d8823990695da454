"""The asking half of mooncake: one link's engine, and the groups of runs it is given."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import FleetError, PeerGone
from vllm_fleet.fabric.contract import KVPool, TransferError
from vllm_fleet.fabric.control import GRACE_S, IDLE_S, RECONNECT_S, Control, Stop
from vllm_fleet.fabric.pacing import PIECE_BYTES_MIN, Pacer, Pause
from vllm_fleet.fabric.plan import BlockCopyPlan, Ints
from vllm_fleet.fabric.transports.mooncake_engine import GROUP_RUNS_MAX, Engine, Group
from vllm_fleet.fabric.work import check_bounds
from vllm_fleet.wire import fabric as wire

NONCE_BYTES = 32
IN_FLIGHT_MAX = 2
"""Groups under way at once; together they have at most GROUP_RUNS_MAX runs."""

_RECONNECT_SETTING = "fabric.control.RECONNECT_S"


@dataclass(frozen=True)
class Theirs:
    """The owner's engine and memory."""

    session: str
    addresses: tuple[int, ...]
    region_bytes: tuple[int, ...]
    nonce_address: int
    nonce: bytes


class MooncakeCopier:
    """See fabric/work.py. The engine is ended, and another one made for the next transfer, whenever something it
    started may still be under way when it must not be."""

    def __init__(
        self, control: Control, theirs: Theirs, pool: KVPool, make: Callable[[], Engine], *, registers: bool
    ) -> None:
        self._control = control
        self._theirs = theirs
        self._pool = pool
        self._make = make
        self._registers = registers
        self._own_addresses = np.array([region.address for region in pool.regions], np.int64)
        self._their_addresses = np.array(theirs.addresses, np.int64)
        self._own_bytes = np.array(pool.sizes, np.int64)
        self._their_bytes = np.array(theirs.region_bytes, np.int64)
        self._landing = np.zeros(NONCE_BYTES, np.uint8)
        self._pacer = Pacer()
        self._engine: Engine | None = None

    def open(self, deadline: Deadline) -> Engine:
        """Reach the owner on both ways and prove Mooncake's with the owner's nonce. Raises FleetError."""
        self._control.open(deadline)
        try:
            self._landing = np.zeros(NONCE_BYTES, np.uint8)  # a new one: an engine given up may still write the old
            opened = _Opening(self._make, self._read_nonce)
            engine = opened.wait(self._control, deadline)
            if self._landing.tobytes() != self._theirs.nonce:
                engine.destroy()
                raise PeerGone(f"{self._control.peer} does not hold what it registered")
        except BaseException:
            self._control.close()
            raise
        self._engine = engine
        return engine

    def _read_nonce(self, engine: Engine) -> Group:
        own = [int(self._landing.ctypes.data)]
        if self._registers:
            addresses = [region.address for region in self._pool.regions]
            engine.register([*addresses, *own], [*self._pool.sizes, NONCE_BYTES])
        return engine.start(
            self._theirs.session,
            write=False,
            own=np.array(own, np.int64),
            theirs=np.array([self._theirs.nonce_address], np.int64),
            nbytes=np.array([NONCE_BYTES], np.int64),
        )

    def read(self, plan: BlockCopyPlan, cancelled: threading.Event) -> None:
        if len(plan):
            check_bounds(plan, self._their_bytes, self._own_bytes)
            self._carry_out(plan, False, cancelled)

    def write(self, plan: BlockCopyPlan, cancelled: threading.Event) -> None:
        if len(plan):
            check_bounds(plan, self._own_bytes, self._their_bytes)
            self._carry_out(plan, True, cancelled)

    def _carry_out(self, plan: BlockCopyPlan, write: bool, cancelled: threading.Event) -> None:
        engine = self._engine
        if engine is None:
            engine = self.open(Deadline.after(RECONNECT_S, _RECONNECT_SETTING))
        under_way: deque[tuple[Group, int, float]] = deque()
        try:
            self._move(engine, plan.split(PIECE_BYTES_MIN), write, under_way, cancelled)
            if not cancelled.is_set():
                self._control.stands(cancelled)
        except FleetError:
            if under_way or not self._control.is_open:
                for group, _, _ in under_way:
                    group.give_up()
                del engine
                self._lose_engine()
            raise

    def _move(
        self,
        engine: Engine,
        plan: BlockCopyPlan,
        write: bool,
        under_way: deque[tuple[Group, int, float]],
        cancelled: threading.Event,
    ) -> None:
        own = self._own_addresses[plan.region] + (plan.source if write else plan.target)
        theirs = self._their_addresses[plan.region] + (plan.target if write else plan.source)
        for part in self._control.permit(wire.MooncakeCheck, plan, write=write, cancelled=cancelled):
            for piece in self._groups(plan.nbytes, part):
                if cancelled.is_set():
                    break
                began, nbytes = time.monotonic(), plan.nbytes[piece]
                try:
                    group = engine.start(
                        self._theirs.session, write=write, own=own[piece], theirs=theirs[piece], nbytes=nbytes
                    )
                except TransferError:
                    self._control.close()  # some of the group's runs may have been started: the engine must end
                    raise
                under_way.append((group, int(nbytes.sum()), began))
                if len(under_way) == IN_FLIGHT_MAX:
                    self._end_first(under_way, cancelled)
        while under_way:
            self._end_first(under_way, cancelled)

    def _groups(self, nbytes: Ints, part: slice) -> Iterator[slice]:
        runs_max = GROUP_RUNS_MAX // IN_FLIGHT_MAX
        for piece in self._pacer.pieces(nbytes, part):
            for start in range(piece.start, piece.stop, runs_max):
                yield slice(start, min(start + runs_max, piece.stop))

    def _end_first(self, under_way: deque[tuple[Group, int, float]], cancelled: threading.Event) -> None:
        """Wait for the oldest group; it stays in the list when that fails."""
        group, nbytes, began = under_way[0]
        pause, stop_at = Pause(), None
        ended, moved_at = 0, time.monotonic()
        while not group.done():
            now = time.monotonic()
            if group.ended > ended:
                ended, moved_at = group.ended, now
            if cancelled.is_set():
                stop_at = now + GRACE_S if stop_at is None else stop_at
                if now >= stop_at:
                    raise Stop("the transfer was cancelled")
            if pause():
                self._control.check_alive()
                if now >= moved_at + IDLE_S:
                    raise TransferError(f"mooncake moved nothing to or from {self._control.peer} for {IDLE_S:.0f} s")
        under_way.popleft()
        group.give_up()
        self._pacer.took(nbytes, time.monotonic() - began)

    def _lose_engine(self) -> None:
        """End the engine: whatever it still had under way is not written any more."""
        engine, self._engine = self._engine, None
        self._control.close()
        if engine is not None:
            engine.destroy()

    def interrupt(self) -> None:
        return  # every wait looks at the event many times a second

    def close(self) -> None:
        self._lose_engine()


class _Opening:
    """Makes an engine and reads the nonce on a thread of its own: the library's handshake has no deadline."""

    def __init__(self, make: Callable[[], Engine], read_nonce: Callable[[Engine], Group]) -> None:
        self._make, self._read_nonce = make, read_nonce
        self._lock = threading.Lock()
        self._given_up = False
        self._engine: Engine | None = None
        self._error: FleetError | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._work, name="fleet-mooncake-open", daemon=True).start()

    def _work(self) -> None:
        engine = None
        try:
            engine = self._make()
            group, pause = self._read_nonce(engine), Pause()
            while not group.done() and not self._given_up:
                pause()
            group.give_up()
        except FleetError as error:
            self._error = error
        finally:
            with self._lock:
                if self._given_up or self._error is not None:
                    if engine is not None:
                        engine.destroy()
                else:
                    self._engine = engine
            self._ended.set()

    def wait(self, control: Control, deadline: Deadline) -> Engine:
        """The engine. Raises DeadlineExceeded, after which nothing is left behind but a thread in the handshake."""
        try:
            while not self._ended.wait(0.02):
                deadline.check(control.peer, "the handshake with mooncake")
                control.check_alive()
        except FleetError:
            with self._lock:
                self._given_up = True
                engine, self._engine = self._engine, None
            if engine is not None:
                engine.destroy()
            raise
        if self._error is not None:
            raise self._error
        if self._engine is None:
            raise PeerGone(f"mooncake could not reach {control.peer}")
        return self._engine
