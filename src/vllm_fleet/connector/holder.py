"""Prefill's half of a worker: holds blocks for decode workers, tells them what is ready, answers their questions."""

from __future__ import annotations

import threading
import time

import numpy as np

from vllm_fleet.connector.jobs import GrowJob, HoldJob
from vllm_fleet.connector.pins import Pin, PinTable
from vllm_fleet.core import limits, log
from vllm_fleet.fabric.contract import KVPool
from vllm_fleet.fabric.endpoint import Endpoint
from vllm_fleet.fabric.plan import Ints
from vllm_fleet.net.channel import Channel
from vllm_fleet.wire import fabric as wire


class Holder:
    """A lock around a PinTable, and the endpoint's handlers for it. ``ended`` is notified when pins end."""

    def __init__(self, endpoint: Endpoint, ended: threading.Condition, *, lease_s: float, hold_s: float) -> None:
        self._table = PinTable(hold_s, lease_s)
        self._changed = ended
        self._pool: KVPool | None = None
        self._early = False
        """Whether readers hear of blocks before they are ready: a read from GPU memory can be prepared meanwhile."""
        self._followers: dict[str, Channel] = {}
        self._names: dict[Channel, str] = {}
        """The follower in whose name a connection opens transfers: both come from one host, over two connections."""
        self._told: dict[str, dict[str, int]] = {}
        """Transfer -> follower -> how many of its blocks the follower has been told."""
        endpoint.handle(wire.Follow, self._follow)
        endpoint.handle(wire.Open, self._open)
        endpoint.handle(wire.Close, self._close)
        endpoint.on_lost(self._lost)

    def use_pool(self, pool: KVPool) -> None:
        """The pool that granted reads are checked against."""
        self._pool = pool
        self._early = pool.cuda is not None

    # The engine's side -------------------------------------------------------------------------------------------

    def begin(self, grows: list[GrowJob], revoked: list[str], holds: list[HoldJob]) -> None:
        """Before a step: requests that have further blocks, that lost theirs, and that have finished."""
        if not grows and not revoked and not holds:
            return
        with self._changed:
            now = time.monotonic()
            for transfer in revoked:
                self._table.revoke(transfer)
            for grow in grows:
                self._table.grow(grow.transfer, grow.request, grow.prompt, grow.blocks)
                if self._early:
                    self._table.changed.add(grow.transfer)
            for job in holds:
                self._table.hold(job.transfer, job.request, job.prompt, job.blocks, job.tokens, now)
            self._tell()

    def publish(self, grows: list[GrowJob]) -> None:
        """After a step, when its KV is in memory: readers may take it."""
        if not grows:
            return
        with self._changed:
            for grow in grows:
                self._table.publish(grow.transfer, grow.ready)
            self._tell()

    def take_ended(self) -> set[str]:
        """Requests whose pins ended since the last call; each is returned once."""
        with self._changed:
            for transfer in self._table.expire(time.monotonic()):
                log.warn("handoff.expired", transfer=transfer)
            self._tell()
            ended, self._table.ended = set(self._table.ended), []
            return ended

    def take_expired(self) -> int:
        """Pins that ended unused since the last call."""
        with self._changed:
            expired, self._table.expired = self._table.expired, 0
            return expired

    @property
    def pins(self) -> int:
        """Transfers whose blocks are held now."""
        with self._changed:
            return sum(pin.known for pin in self._table.pins.values())

    @property
    def blocks(self) -> int:
        """Blocks held now for finished requests."""
        with self._changed:
            return sum(len(pin.blocks) for pin in self._table.pins.values() if pin.held)

    @property
    def has_ended(self) -> bool:
        """Whether take_ended would return something; the condition must be held."""
        return bool(self._table.ended)

    # The peers' side ---------------------------------------------------------------------------------------------

    def grants(self, grant: str, regions: Ints, offsets: Ints, nbytes: Ints) -> bool:
        """Whether these runs lie in blocks of an open transfer; arrays of shape [runs]."""
        pool = self._pool
        if pool is None:
            return False
        strides = np.array([region.block_stride for region in pool.regions], np.int64)[regions]
        with self._changed:
            return self._table.covers(grant, offsets // strides, (offsets + nbytes - 1) // strides)

    def _follow(self, channel: Channel, question: wire.Question) -> wire.Answer:
        assert isinstance(question, wire.Follow)
        with self._changed:
            taken = question.follower in self._followers or channel in self._followers.values()
            if taken or len(self._followers) >= limits.CONNECTIONS_MAX:
                return wire.Denied("already_open")
            self._followers[question.follower] = channel
        return wire.Following()

    def _open(self, channel: Channel, question: wire.Question) -> wire.Answer:
        assert isinstance(question, wire.Open)
        with self._changed:
            known = question.follower in self._followers
            if not known or self._names.setdefault(channel, question.follower) != question.follower:
                return wire.Denied("unsupported", "follow first, in the name in which transfers are opened")
            pin = self._table.open(
                question.transfer,
                channel,
                time.monotonic(),
                prompt=question.prompt,
                reader=question.reader,
                readers=question.readers,
                wait=True,
            )
            self._tell()  # what had expired
            if pin is None:
                return wire.Denied(self._refusal(question))
            ready, blocks = _ready(pin)
            self._told.setdefault(question.transfer, {})[question.follower] = len(blocks)
            return wire.Opened(blocks, ready)

    def _refusal(self, question: wire.Open) -> wire.Refusal:
        pin = self._table.pins.get(question.transfer)
        if pin is None:
            return "unknown_transfer"
        other = pin.known and pin.prompt != question.prompt
        return "other_prompt" if other else "already_open"

    def _close(self, channel: Channel, question: wire.Question) -> wire.Answer:
        assert isinstance(question, wire.Close)
        with self._changed:
            self._told.get(question.transfer, {}).pop(self._names.get(channel, ""), None)
            valid = self._table.close(
                question.transfer, channel, time.monotonic(), reader=question.reader, wait=not question.taken
            )
            self._tell()
            self._changed.notify_all()
        return wire.Closed(valid)

    def _lost(self, channel: Channel) -> None:
        with self._changed:
            self._names.pop(channel, None)
            for follower in [name for name, known in self._followers.items() if known is channel]:
                del self._followers[follower]
                for told in self._told.values():
                    told.pop(follower, None)
            self._table.lost(channel)
            self._tell()
            self._changed.notify_all()

    def _tell(self) -> None:
        """Tell followers of what has changed; the lock is held. A follower that does not read is cut off."""
        changed, self._table.changed = self._table.changed, set()
        refused, self._table.refused = self._table.refused, set()
        messages: dict[str, list[wire.Update]] = {}
        for transfer in changed | refused:
            pin = self._table.pins.get(transfer) if transfer not in refused else None
            told = self._told.get(transfer, {})
            for follower, count in told.items():
                if pin is None:
                    update = wire.Update(transfer, 0, (), 0, gone=True)
                else:
                    ready, blocks = _ready(pin)
                    update = wire.Update(transfer, count, blocks[count:], ready)
                    told[follower] = len(blocks)
                messages.setdefault(follower, []).append(update)
            if pin is None:
                self._told.pop(transfer, None)
        for follower, updates in messages.items():
            channel = self._followers.get(follower)
            if channel is not None and not channel.push(wire.encode(wire.Progress(tuple(updates)))):
                log.warn("follower.slow", peer=channel.peer)
                channel.abort()


def _ready(pin: Pin) -> tuple[int, tuple[int, ...]]:
    """What readers of a pin may know."""
    return pin.ready, tuple(pin.blocks)
