"""Links whose short reads are started on the caller's thread: the GPU works by itself, no thread need wait for it.

That a copy has ended is seen in host memory: its kernel puts the owner's nonce there when it is through
(programs.read_kernel). Looking costs 0.1 us, an event 3 us. The event behind the kernel is asked only when the nonce is
late: because it is another one, or the kernel failed.
"""

from __future__ import annotations

import select
import threading
import time
from typing import TYPE_CHECKING

from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import FleetError, PeerGone
from vllm_fleet.fabric.contract import Transfer, TransferCancelledError, TransferError
from vllm_fleet.fabric.plan import BlockCopyPlan
from vllm_fleet.fabric.transports.cuda.slots import Slot
from vllm_fleet.fabric.work import WorkLink

if TYPE_CHECKING:
    from vllm_fleet.fabric.transports.cuda.reader import IpcCopier

BYTES_PER_S = 400e9  # NVLink of an H200: no copy is there sooner
NEAR_S = 300e-6  # so long before the end that is expected, and ...
LATE = 8  # ... so long, and an eighth of the copy's own time, after it, a copy is looked for all the time, ...
PAUSE_S = 50e-6  # ... later at this interval
DOUBT_S = 200e-6  # so long after the end that is expected, and at this interval, the event is asked as well
LOOKS = 16  # between chances for other threads: 2 us


class DirectTransfer:
    """A Transfer that was started on the caller's thread, and ends when somebody looks after it."""

    def __init__(self, slot: Slot, nonce: bytes, peer: str, starts: float, copy_s: float) -> None:
        """``starts``, on time.monotonic(): when its first byte is expected to move, ``copy_s`` before its last."""
        self._slot, self._nonce, self._peer = slot, nonce, peer
        self._first = int.from_bytes(nonce[:8], "little", signed=True)
        self._expected, self._copy_s = starts + copy_s, copy_s
        self._doubt = self._expected + DOUBT_S
        self._lock = threading.Lock()
        self._ended = False
        self._error: FleetError | None = None

    def has_ended(self) -> bool:
        """Whether it is done, failed or cancelled; it uses its slot no more then."""
        with self._lock:
            return self._look()

    def fail(self, error: FleetError) -> None:
        """End it; nothing of it is under way."""
        with self._lock:
            self._end(error)

    def done(self) -> bool:
        with self._lock:
            ended = self._look()
        if self._error is not None:
            raise self._error
        return ended

    def wait(self, deadline: Deadline) -> None:
        seen, first = self._slot.seen, self._first
        late = self._expected + NEAR_S + self._copy_s / LATE
        others = select.poll()  # of nothing: 0.3 us, lets other threads run; time.sleep(0) takes 70 us on Python 3.12
        while not self.done():
            if deadline.expired():
                self.cancel()
                raise deadline.error("the transfer", "copying")
            now = time.monotonic()
            if now > late:
                time.sleep(min(PAUSE_S, deadline.remaining()))
            elif self._expected - now > 2 * NEAR_S:
                time.sleep(min(self._expected - now - NEAR_S, deadline.remaining()))
            else:
                others.poll(0)
                for _ in range(LOOKS):
                    if seen[0] == first:
                        break

    def cancel(self) -> None:
        with self._lock:
            if self._ended:
                return
            try:
                self._slot.event.wait()  # bounded: what is under way takes reads.DIRECT_S_MAX
            finally:
                self._end(TransferCancelledError("the transfer was cancelled"))

    def _look(self) -> bool:
        if self._ended:
            return True
        slot = self._slot
        if slot.seen[0] == self._first and slot.seen.tobytes() == self._nonce:
            self._end(None)
        elif time.monotonic() > self._doubt:
            try:
                if slot.event.passed():
                    self._end(self._verdict())
            except FleetError as error:
                self._end(error)
            self._doubt = time.monotonic() + DOUBT_S
        return self._ended

    def _verdict(self) -> FleetError | None:
        """What is wrong, when all has ended. Memory outlives its owner while it is mapped: what was read is right."""
        if self._slot.seen.tobytes() == self._nonce:
            return None
        return TransferError(f"{self._peer} does not hold what it registered: withdrawn or replaced")

    def _end(self, error: FleetError | None) -> None:
        if isinstance(error, PeerGone) and not isinstance(error, TransferError):
            error = TransferError(str(error))
        self._error, self._ended = error, True
        if self._slot.user is self:
            self._slot.user = None


class IpcLink:
    """A Link: reads go the direct way if nothing waits for the link's thread, so that transfers keep their order."""

    def __init__(self, transport: str, peer: str, copier: IpcCopier) -> None:
        self.transport = transport
        self._copier = copier
        self._work = WorkLink(transport, peer, copier)
        self._order = threading.Lock()
        self._last: Transfer | None = None
        self._closed = False

    def prepare(self, plan: BlockCopyPlan) -> None:
        with self._order:
            if not self._closed:
                self._copier.prepare(plan)

    def read(self, plan: BlockCopyPlan) -> Transfer:
        with self._order:
            if not self._closed and (self._last is None or self._idle()):
                direct = self._copier.start_read(plan)
                if direct is not None:
                    return direct
            self._last = self._work.read(plan)
            return self._last

    def write(self, plan: BlockCopyPlan) -> Transfer:
        with self._order:
            self._last = self._work.write(plan)
            return self._last

    def close(self) -> None:
        with self._order:
            already, self._closed = self._closed, True
        if not already:
            self._copier.cancel_direct()
        self._work.close()

    def _idle(self) -> bool:
        """Whether the link's thread has carried out all it was given."""
        if self._last is None:
            return True
        try:
            ended = self._last.done()
        except FleetError:
            ended = True
        if ended:
            self._last = None
        return ended
