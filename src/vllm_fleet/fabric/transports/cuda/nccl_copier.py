"""The asking end of an nccl link: a connection to the owner's endpoint and a communicator with it, remade when lost."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Annotated, NamedTuple

import numpy as np
import torch
from msgspec import Meta, Struct

from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import FleetError, LinkError
from vllm_fleet.fabric.contract import KVPool
from vllm_fleet.fabric.endpoint import probe
from vllm_fleet.fabric.plan import BlockCopyPlan
from vllm_fleet.fabric.rendezvous import ChannelRendezvous
from vllm_fleet.fabric.transports.cuda.communicator import Communicator
from vllm_fleet.fabric.transports.cuda.joining import Watch, poll
from vllm_fleet.fabric.transports.cuda.nccl_link import Stop
from vllm_fleet.fabric.transports.cuda.nccl_questions import Answers, Asked, Memory, Questions, RefusedError, Within
from vllm_fleet.fabric.transports.cuda.nccl_tuning import Tuning
from vllm_fleet.fabric.transports.cuda.pipe import IDLE_S, IDLE_SETTING, Pipe
from vllm_fleet.net.channel import Channel, Credentials, connect
from vllm_fleet.wire import fabric as wire
from vllm_fleet.wire.fabric import PoolHandle
from vllm_fleet.wire.names import Port

RECONNECT_S = 2.0
"""A lost connection is made again within this time, in which a cancel waits."""

REJOIN_S = 10.0
"""... and its communicators (0.5 s on one host) within this; a cancel ends it at once."""

PREPARED_MAX = 4
"""Plans whose first question is made and not asked yet; the oldest gives way."""

SEND_BUFFER_BYTES = 256 << 10  # SO_SNDBUF; the kernel doubles it for its own book-keeping

PROBE_BYTES = 32


class NcclDetails(Struct, frozen=True):
    """The nccl part of a PoolHandle."""

    host: Annotated[str, Meta(min_length=1, max_length=255)]
    port: Port
    gpu: Annotated[bytes, Meta(min_length=16, max_length=16)]
    """UUID of the pool's GPU: NCCL wants the two sides on different ones."""


class _Open(NamedTuple):
    channel: Channel
    pipe: Pipe


class NcclCopier:
    """See the module's docstring. A Copier (fabric/work.py): open() and the copies are for one thread at a time."""

    def __init__(
        self, details: NcclDetails, peer: PoolHandle, pool: KVPool, credentials: Credentials, tuning: Tuning
    ) -> None:
        assert pool.cuda is not None
        self._details, self._peer, self._credentials, self._tuning = details, peer, credentials, tuning
        self._device = pool.cuda
        addresses = np.array([region.address for region in pool.regions], np.int64)
        own, theirs = np.array(pool.sizes, np.int64), np.array(peer.region_bytes, np.int64)
        self._memory = Memory(addresses, own, peer.pool, theirs, tuning.chunk_bytes)
        pair = secrets.token_hex(16)
        self._rendezvous = ChannelRendezvous(
            lambda epoch, unique_id: wire.NcclJoin(
                pair, epoch, peer.pool, unique_id, tuning.chunk_bytes, tuning.ctas_max
            )
        )
        self._open: _Open | None = None
        self._channel: Channel | None = None
        """The connection that interrupt() cuts."""
        self._lock = threading.Lock()
        self._prepared: dict[int, Questions] = {}
        """By the id of the plan, which each holds on to."""

    def open(self, watch: Watch, deadline: Deadline, reached: Deadline) -> _Open:
        """Connect until ``reached``, form a communicator and prove it with a real read of a few bytes."""
        channel = connect(self._details.host, self._details.port, self._credentials, reached)
        self._channel = self._rendezvous.channel = channel
        pipe = None
        try:
            channel.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            both = _both(watch, channel)
            probe(channel, self._peer.pool, deadline)  # before NCCL makes an id, which keeps a thread
            with torch.cuda.device(self._device):
                communicator = Communicator(self._rendezvous, self._device, self._tuning, both, deadline)
                try:
                    pipe = Pipe(communicator, self._device, self._tuning)
                except BaseException:
                    communicator.abort()
                    raise
                self._probe(channel, pipe, both, deadline)
        except BaseException:
            self._end(channel, pipe)
            raise
        self._open = _Open(channel, pipe)
        return self._open

    def prepare(self, plan: BlockCopyPlan) -> None:
        """Make the first question of a read of this very plan beforehand, unless there is none. By any thread."""
        if not len(plan):
            return
        with contextlib.suppress(FleetError):  # read() will say what is wrong
            questions = Questions(self._memory, plan, write=False)
            questions.make_first()
            with self._lock:
                self._prepared[id(plan)] = questions
                if len(self._prepared) > PREPARED_MAX:
                    del self._prepared[next(iter(self._prepared))]

    def read(self, plan: BlockCopyPlan, cancelled: threading.Event) -> None:
        self._copy(plan, cancelled, write=False)

    def write(self, plan: BlockCopyPlan, cancelled: threading.Event) -> None:
        self._copy(plan, cancelled, write=True)

    def interrupt(self) -> None:
        channel = self._channel
        if channel is not None:
            channel.abort()

    def close(self) -> None:
        if self._open is not None:
            self._end(*self._open)

    def _copy(self, plan: BlockCopyPlan, cancelled: threading.Event, *, write: bool) -> None:
        if not len(plan):
            return
        assert isinstance(cancelled, Stop)
        watch, within = cancelled.watch, cancelled.within
        with self._lock:
            prepared = self._prepared.pop(id(plan), None)
        questions = Questions(self._memory, plan, write=write) if prepared is None or write else prepared
        with self._connection(watch, within) as (channel, pipe), torch.cuda.device(self._device):
            answers, count = Answers(channel, within), len(questions.parts)

            def idle() -> Deadline:
                return within(IDLE_S, IDLE_SETTING)

            def both() -> None:
                watch()
                answers.take_arrived()

            def ask(asked: Asked) -> None:
                answers.wanted.extend(asked.answers)
                channel.send(asked.question, idle())

            move = pipe.send if write else pipe.receive
            ask(questions.ask(0))
            pieces = questions.pieces(0)
            for index in range(count):
                following = None
                if index + 1 < count:  # the first while the owner checks
                    following = questions.ask(index + 1), questions.pieces(index + 1)
                if index == 0:
                    poll(lambda: answers.taken > 0, both, idle(), channel.peer, "answering")
                if following is not None:
                    ask(following[0])
                move(pieces, both)
                if following is not None:
                    pieces = following[1]
            pipe.drain(both)
            poll(lambda: answers.taken > count, both, idle(), channel.peer, "confirming the transfer")
            watch()

    @contextlib.contextmanager
    def _connection(self, watch: Watch, within: Within) -> Iterator[_Open]:
        """Connection and communicator, made anew if lost; given up when a transfer ends early."""
        held = self._open
        if held is not None and not held.channel.is_open():  # the owner has ended it, or an interrupt came too late
            self._end(*held)
            held = None
        if held is None:
            again = within(REJOIN_S, "fabric.transports.cuda.nccl_copier.REJOIN_S")
            reached = within(RECONNECT_S, "fabric.transports.cuda.nccl_copier.RECONNECT_S")
            held = self.open(watch, again, reached)
        try:
            yield held
        except RefusedError:  # before anything was enqueued
            raise
        except BaseException:
            self._end(*held)
            raise

    def _end(self, channel: Channel, pipe: Pipe | None) -> None:
        self._open = self._channel = self._rendezvous.channel = None
        channel.close()
        if pipe is not None:
            with torch.cuda.device(self._device):
                pipe.abort()

    @staticmethod
    def _probe(channel: Channel, pipe: Pipe, watch: Watch, deadline: Deadline) -> None:
        pattern = secrets.token_bytes(PROBE_BYTES)
        channel.send(wire.encode(wire.NcclPing(pattern)), deadline)
        expected = wire.Reading(PROBE_BYTES), wire.Moved(PROBE_BYTES)
        answers = Answers(channel, lambda seconds, setting: deadline, *expected)

        def both() -> None:
            watch()
            answers.take_arrived()

        poll(lambda: answers.taken > 0, both, deadline, channel.peer, "answering")
        if pipe.exchange(pattern, both) != pattern:
            raise LinkError(f"{channel.peer} sent something else through NCCL than it was asked for")
        poll(lambda: answers.taken > 1, both, deadline, channel.peer, "confirming the exchange")


def _both(watch: Watch, channel: Channel) -> Callable[[], None]:
    """Ends a wait also when the owner closes the connection."""

    def both() -> None:
        watch()
        channel.has_arrived()

    return both
