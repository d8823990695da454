"""Prefill's half of a worker: holds blocks for decode workers and answers their questions about them."""

from __future__ import annotations

import threading
import time

import numpy as np

from vllm_fleet.connector.jobs import HoldJob
from vllm_fleet.connector.pins import PinTable
from vllm_fleet.core import log
from vllm_fleet.fabric.contract import KVPool
from vllm_fleet.fabric.endpoint import Endpoint
from vllm_fleet.fabric.plan import Ints
from vllm_fleet.net.channel import Channel
from vllm_fleet.wire import fabric as wire

OPEN_WAIT_S = 1.0
"""A prefill answer reaches decode before this worker hears of the hold, by an engine step: wait this long for it."""

CLOSE_WAIT_S = 0.2
"""The same for a decode that gives a transfer up at once; longer would hold up its next question."""


class Holder:
    """A lock around a PinTable, and the endpoint's handlers for it. ``ended`` is notified when pins end."""

    def __init__(self, endpoint: Endpoint, ended: threading.Condition, *, lease_s: float, hold_s: float) -> None:
        self._table = PinTable(hold_s)
        self._lease_s = lease_s
        self._changed = ended
        self._pool: KVPool | None = None
        endpoint.handle(wire.Open, self._open)
        endpoint.handle(wire.Close, self._close)
        endpoint.on_lost(self._lost)

    def use_pool(self, pool: KVPool) -> None:
        """The pool that granted reads are checked against."""
        self._pool = pool

    def hold(self, jobs: list[HoldJob]) -> None:
        """Hold the blocks of finished requests from now on."""
        if not jobs:
            return
        with self._changed:
            deadline = time.monotonic() + self._lease_s
            for job in jobs:
                self._table.hold(job.transfer, job.request, job.blocks, deadline)
            self._changed.notify_all()

    def take_ended(self) -> set[str]:
        """Requests whose pins ended since the last call; each is returned once."""
        with self._changed:
            for transfer in self._table.expire(time.monotonic()):
                log.warn("handoff.expired", transfer=transfer, lease_s=self._lease_s)
            ended, self._table.ended = set(self._table.ended), []
            return ended

    def take_expired(self) -> int:
        """Pins that ended unused since the last call."""
        with self._changed:
            expired, self._table.expired = self._table.expired, 0
            return expired

    @property
    def pins(self) -> int:
        """Transfers held now."""
        with self._changed:
            return len(self._table.pins)

    @property
    def has_ended(self) -> bool:
        """Whether take_ended would return something; the condition must be held."""
        return bool(self._table.ended)

    def grants(self, grant: str, regions: Ints, offsets: Ints, nbytes: Ints) -> bool:
        """Whether these runs lie in blocks of an open transfer; arrays of shape [runs]."""
        pool = self._pool
        if pool is None:
            return False
        strides = np.array([region.block_stride for region in pool.regions], np.int64)[regions]
        with self._changed:
            return self._table.covers(grant, offsets // strides, (offsets + nbytes - 1) // strides)

    def _open(self, channel: Channel, question: wire.Question) -> wire.Answer:
        assert isinstance(question, wire.Open)
        with self._changed:
            if not self._changed.wait_for(lambda: question.transfer in self._table.pins, OPEN_WAIT_S):
                return wire.Denied("unknown_transfer")
            pin = self._table.open(question.transfer, channel, time.monotonic())
            return wire.Denied("already_open") if pin is None else wire.Opened(pin.blocks)

    def _close(self, channel: Channel, question: wire.Question) -> wire.Answer:
        assert isinstance(question, wire.Close)
        with self._changed:
            if not question.taken:
                self._changed.wait_for(lambda: question.transfer in self._table.pins, CLOSE_WAIT_S)
            valid = self._table.close(question.transfer, channel, time.monotonic())
            self._changed.notify_all()
        return wire.Closed(valid)

    def _lost(self, channel: Channel) -> None:
        with self._changed:
            self._table.lost(channel)
            self._changed.notify_all()
