"""Transfers that run on a link's own thread: the shared half of transports whose copy is a blocking system call."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Protocol

from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import FleetError, PeerGone
from vllm_fleet.fabric.contract import TransferCancelledError, TransferError
from vllm_fleet.fabric.plan import BlockCopyPlan, Ints

Copy = Callable[[BlockCopyPlan, threading.Event], None]


class Copier(Protocol):
    """What one kind of link does on its thread. Errors are FleetErrors."""

    def read(self, plan: BlockCopyPlan, cancelled: threading.Event) -> None:
        """Copy the peer's bytes into our pool, looking at the event between steps of bounded length; return early,
        with nothing in flight, once it is set."""
        ...

    def write(self, plan: BlockCopyPlan, cancelled: threading.Event) -> None:
        """The same from our pool into the peer's."""
        ...

    def interrupt(self) -> None:
        """Wake read() or write() where they wait; called from other threads after the event was set.

        The copy may be over but for its return: what was interrupted must be found out, or work, when the next begins.
        """
        ...

    def close(self) -> None:
        """Give everything back; called once, on the link's thread, after its last copy."""
        ...


class WorkTransfer:
    """A Transfer that a WorkLink's thread carries out."""

    def __init__(self, copy: Copy, plan: BlockCopyPlan, interrupt: Callable[[], None]) -> None:
        self.plan = plan
        self._copy = copy
        self.cancelled = threading.Event()
        self._lock = threading.Lock()
        self._running = False
        self._ended = threading.Event()
        self._error: FleetError | None = None
        self._interrupt = interrupt

    def run(self) -> None:
        """Carry it out, on the link's thread; never raises a FleetError."""
        with self._lock:
            self._running = not self.cancelled.is_set()
        try:
            if self._running:
                self._copy(self.plan, self.cancelled)
        except FleetError as error:
            if isinstance(error, PeerGone) and not isinstance(error, TransferError):
                self._error = TransferError(str(error))
            else:
                self._error = error
        except BaseException as error:
            self._error = TransferError(f"the transfer broke: {type(error).__name__}: {error}")
            raise
        finally:
            with self._lock:  # a cancel() that comes later neither interrupts nor changes the outcome
                self._running = False
                if self.cancelled.is_set():
                    self._error = TransferCancelledError("the transfer was cancelled")
                self._ended.set()

    def end(self, error: FleetError) -> None:
        """End it without running it."""
        self._error = error
        self._ended.set()

    def done(self) -> bool:
        if not self._ended.is_set():
            if self.cancelled.is_set():
                raise TransferCancelledError("the transfer was cancelled")
            return False
        if self._error is not None:
            raise self._error
        return True

    def wait(self, deadline: Deadline) -> None:
        if not self._ended.wait(deadline.remaining()):
            self.cancel()
            if not self._ended.is_set() or self._error is not None:
                raise deadline.error("the transfer", "copying")
        self.done()

    def mark(self) -> None:
        """Cancel without waiting: it ends at its next look at the event, or does not begin."""
        with self._lock:
            if not self._ended.is_set():
                self.cancelled.set()

    def cancel(self) -> None:
        with self._lock:
            if self._ended.is_set():
                return
            self.cancelled.set()
            running = self._running
            if running:  # under the lock: an interrupt never hits the transfer after this one
                self._interrupt()
        if running:
            self._ended.wait()  # bounded: every copy looks at the event between calls of bounded size


class WorkLink:
    """A Link with one thread on which a Copier carries out transfers in order."""

    def __init__(self, transport: str, peer: str, copier: Copier) -> None:
        self.transport = transport
        self._copier = copier
        self._queue: queue.SimpleQueue[WorkTransfer | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._running: set[WorkTransfer] = set()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"fleet-{transport}-{peer}", daemon=True)
        self._thread.start()

    def prepare(self, plan: BlockCopyPlan) -> None:
        """Nothing: the link's thread works out what it needs."""

    def read(self, plan: BlockCopyPlan) -> WorkTransfer:
        return self._start(self._copier.read, plan)

    def write(self, plan: BlockCopyPlan) -> WorkTransfer:
        return self._start(self._copier.write, plan)

    def close(self) -> None:
        with self._lock:
            already, self._closed = self._closed, True
            running = list(self._running)
        for transfer in running:
            transfer.mark()  # all before the first is interrupted: none of them begins any more
        for transfer in running:
            transfer.cancel()
        if not already:
            self._queue.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _start(self, copy: Copy, plan: BlockCopyPlan) -> WorkTransfer:
        transfer = WorkTransfer(copy, plan, self._copier.interrupt)
        with self._lock:
            if self._closed:
                transfer.end(TransferError("the link is closed"))
                return transfer
            self._running.add(transfer)
            self._queue.put(transfer)
        return transfer

    def _work(self) -> None:
        try:
            while (transfer := self._queue.get()) is not None:
                try:
                    transfer.run()
                finally:
                    with self._lock:
                        self._running.discard(transfer)
        finally:
            self._copier.close()


def check_bounds(plan: BlockCopyPlan, source_bytes: Ints, target_bytes: Ints) -> None:
    """TransferError unless every run lies inside its source and target region; sizes are arrays of shape [regions]."""
    if int(plan.nbytes.min()) <= 0:
        raise TransferError(f"the plan has a run of {int(plan.nbytes.min())} bytes: none may be empty or negative")
    if int(plan.region.max()) >= min(len(source_bytes), len(target_bytes)) or int(plan.region.min()) < 0:
        raise TransferError(f"the plan names region {int(plan.region.max())}, which one side does not have")
    for offsets, sizes, side in ((plan.source, source_bytes, "source"), (plan.target, target_bytes, "target")):
        # Never offset + length, which wraps around for lengths near 2**63.
        if bool(((offsets < 0) | (plan.nbytes > sizes[plan.region] - offsets)).any()):
            raise TransferError(f"the plan reaches outside the registered memory of its {side}")
