"""The Link of the nccl transport: whoever waits for a transfer whose turn it is carries it out itself.

Handing a short transfer to the link's thread and being woken by it costs two changes of threads, some 200 us where the
cores sleep, as long as half of a copy of 128 MiB takes. A transfer that nobody waits for is carried out all the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import FleetError
from vllm_fleet.fabric.contract import TransferCancelledError, TransferError
from vllm_fleet.fabric.plan import BlockCopyPlan
from vllm_fleet.fabric.work import Copier, Copy, WorkLink, WorkTransfer


class Stop(threading.Event):
    """Set by cancel(). ``deadline`` is that of the waiting thread which carries the transfer out, if one does."""

    deadline: Deadline | None = None

    def watch(self) -> None:
        """Raises TransferCancelledError when the transfer is to end; from the deadline on it is cancelled."""
        if self.deadline is not None and self.deadline.expired():
            self.set()
        if self.is_set():
            raise TransferCancelledError("the transfer was cancelled")

    def within(self, seconds: float, setting: str) -> Deadline:
        """The end of a wait inside the transfer: ``seconds`` from now, and never later than ``deadline``."""
        own = Deadline.after(seconds, setting)
        return own if self.deadline is None or own.at < self.deadline.at else self.deadline


class NcclTransfer(WorkTransfer):
    """A WorkTransfer that the first thread to claim it carries out: the link's, or one that waits for it."""

    def __init__(
        self, copy: Copy, plan: BlockCopyPlan, interrupt: Callable[[], None], before: NcclTransfer | None
    ) -> None:
        super().__init__(copy, plan, interrupt)
        self.cancelled: Stop = Stop()
        self._before = before
        """The one started before it on its link, until that has ended: transfers keep their order."""
        self._claimed = False

    def run(self) -> None:
        if self._claim():
            super().run()
        else:
            self._ended.wait()  # bounded: by the deadline of whoever carries it out

    def wait(self, deadline: Deadline) -> None:
        if self._is_next() and not deadline.expired() and self._claim():
            self.cancelled.deadline = deadline
            super().run()
            if self._error is not None and deadline.expired():
                raise deadline.error("the transfer", "copying")
        super().wait(deadline)

    def end(self, error: FleetError) -> None:
        self._claimed = True
        super().end(error)

    def has_ended(self) -> bool:
        """Whether it is done, failed or cancelled, and uses its link no more."""
        return self._ended.is_set()

    def _is_next(self) -> bool:
        before = self._before
        if before is not None and before.has_ended():
            before = self._before = None
        return before is None

    def _claim(self) -> bool:
        with self._lock:
            claimed, self._claimed = self._claimed, True
        if not claimed:
            self._before = None  # it has ended; no chain of all transfers of a link
        return not claimed


class Preparing(Copier, Protocol):
    """A Copier that can do a part of a read beforehand."""

    def prepare(self, plan: BlockCopyPlan) -> None:
        """As Link.prepare(), which see."""
        ...


class NcclLink(WorkLink):
    """A Link whose transfers may be carried out by whoever waits for them."""

    def __init__(self, transport: str, peer: str, copier: Preparing) -> None:
        super().__init__(transport, peer, copier)
        self._prepare = copier.prepare
        self._last: NcclTransfer | None = None

    def prepare(self, plan: BlockCopyPlan) -> None:
        if not self._closed:
            self._prepare(plan)

    def _start(self, copy: Copy, plan: BlockCopyPlan) -> WorkTransfer:
        with self._lock:
            before = self._last if self._last is not None and not self._last.has_ended() else None
            transfer = NcclTransfer(copy, plan, self._copier.interrupt, before)
            if self._closed:
                transfer.end(TransferError("the link is closed"))
                return transfer
            self._last = transfer
            self._running.add(transfer)
            self._queue.put(transfer)
        return transfer

    def is_closed(self) -> bool:
        """Whether close() was called and has ended."""
        return self._closed and not self._thread.is_alive()
