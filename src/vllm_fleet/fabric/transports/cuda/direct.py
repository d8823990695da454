"""Links whose short reads are started on the caller's thread: the GPU works by itself, no thread need wait for it."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import FleetError, PeerGone
from vllm_fleet.fabric.contract import Transfer, TransferCancelledError, TransferError
from vllm_fleet.fabric.plan import BlockCopyPlan
from vllm_fleet.fabric.transports.cuda import driver
from vllm_fleet.fabric.transports.cuda.mapping import NONCE_BYTES
from vllm_fleet.fabric.work import WorkLink

if TYPE_CHECKING:
    from vllm_fleet.fabric.transports.cuda.reader import IpcCopier

BYTES_PER_S = 400e9  # NVLink of an H200: no copy is there sooner
NEAR_S = 300e-6  # around the time it is expected a copy is looked for all the time, ...
PAUSE_S = 50e-6  # ... later at this interval


class Slot:
    """Where one transfer's nonce arrives, and the event that tells so. ``words``: int64 of shape [NONCE_BYTES / 8]."""

    def __init__(self, device: int, pinned: driver.Pinned, index: int) -> None:
        count = NONCE_BYTES // 8
        self.words = pinned.words[index * count : (index + 1) * count]
        self.address = pinned.address + index * NONCE_BYTES
        self.event = driver.Event(device)
        self.user: DirectTransfer | None = None

    def close(self) -> None:
        self.event.close()


class DirectTransfer:
    """A Transfer that was started on the caller's thread, and ends when somebody looks after it."""

    def __init__(self, copier: IpcCopier, slot: Slot, nbytes: int) -> None:
        self._copier, self._slot = copier, slot
        self._expected = time.monotonic() + nbytes / BYTES_PER_S
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
        while not self.done():
            if deadline.expired():
                self.cancel()
                raise deadline.error("the transfer", "copying")
            left = self._expected - time.monotonic()
            pause = left - NEAR_S if left > 2 * NEAR_S else 0.0 if left > -NEAR_S else PAUSE_S
            time.sleep(min(pause, deadline.remaining()))

    def cancel(self) -> None:
        with self._lock:
            if self._ended:
                return
            try:
                self._slot.event.wait()  # bounded: SLOTS transfers of DIRECT_BYTES_MAX, some milliseconds
            finally:
                self._end(TransferCancelledError("the transfer was cancelled"))

    def _look(self) -> bool:
        if self._ended:
            return True
        try:
            if not self._slot.event.passed():
                return False
            self._copier.check(self._slot)
        except FleetError as error:
            self._end(error)
        self._ended = True
        return True

    def _end(self, error: FleetError) -> None:
        if isinstance(error, PeerGone) and not isinstance(error, TransferError):
            error = TransferError(str(error))
        self._error, self._ended = error, True


class IpcLink:
    """A Link: reads go the direct way if nothing waits for the link's thread, so that transfers keep their order."""

    def __init__(self, transport: str, peer: str, copier: IpcCopier) -> None:
        self.transport = transport
        self._copier = copier
        self._work = WorkLink(transport, peer, copier)
        self._order = threading.Lock()
        self._last: Transfer | None = None
        self._closed = False

    def read(self, plan: BlockCopyPlan) -> Transfer:
        with self._order:
            if not self._closed and self._idle():
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
