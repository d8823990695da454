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
from vllm_fleet.core.errors import Corrupt, LinkError
from vllm_fleet.fabric.contract import KVPool, TransferError
from vllm_fleet.fabric.endpoint import probe, receive_answer
from vllm_fleet.fabric.owner import encode_runs
from vllm_fleet.fabric.plan import BlockCopyPlan, Ints
from vllm_fleet.fabric.rendezvous import ChannelRendezvous
from vllm_fleet.fabric.transports.cuda.communicator import Communicator
from vllm_fleet.fabric.transports.cuda.joining import Watch, poll
from vllm_fleet.fabric.transports.cuda.nccl_link import Stop
from vllm_fleet.fabric.transports.cuda.nccl_pieces import message_sizes
from vllm_fleet.fabric.transports.cuda.nccl_tuning import Tuning
from vllm_fleet.fabric.transports.cuda.pieces import Pieces, cut, parts
from vllm_fleet.fabric.transports.cuda.pipe import IDLE_S, IDLE_SETTING, ROW_BYTES_MAX, Pipe
from vllm_fleet.fabric.work import check_bounds
from vllm_fleet.net.channel import Channel, Credentials, connect
from vllm_fleet.wire import fabric as wire
from vllm_fleet.wire.fabric import PoolHandle
from vllm_fleet.wire.names import Port

RECONNECT_S = 2.0
"""A lost connection is made again within this time, in which a cancel waits."""

REJOIN_S = 10.0
"""... and its communicators (0.5 s on one host) within this; a cancel ends it at once."""

PART_RUNS_MAX = 8192
PART_BYTES_MAX = [256 << 20]
PART_PIECES_MAX = 32
"""Runs, bytes and whole pieces of each question of a transfer: the wire has work enough in one for the time that the
next one takes the owner (some 0.3 ms), and a shorter first one would gain less than that costs.

Each has fewer pieces than pipe.AHEAD_MAX and fits the pipe's tables: so the owner never waits for pieces of the
question it works on, and reads the next one, whatever this side has yet to enqueue.
"""
RUN_BYTES_MAX = 1 << 20  # longer runs are named in parts, since questions are cut between runs

SEND_BUFFER_BYTES = 256 << 10  # SO_SNDBUF; the kernel doubles it for its own book-keeping

PROBE_BYTES = 32


Within = Callable[[float, str], Deadline]
"""So many seconds from now, or the transfer's own deadline if that is earlier; (seconds, setting)."""


class NcclDetails(Struct, frozen=True):
    """The nccl part of a PoolHandle."""

    host: Annotated[str, Meta(min_length=1, max_length=255)]
    port: Port
    gpu: Annotated[bytes, Meta(min_length=16, max_length=16)]
    """UUID of the pool's GPU: NCCL wants the two sides on different ones."""


class _Open(NamedTuple):
    channel: Channel
    pipe: Pipe


class _Memory(NamedTuple):
    """Both pools; arrays of shape [regions]."""

    addresses: Ints
    own_bytes: Ints
    peer: str
    peer_bytes: Ints
    chunk_bytes: int


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
        self._memory = _Memory(addresses, own, peer.pool, theirs, tuning.chunk_bytes)
        pair = secrets.token_hex(16)
        self._rendezvous = ChannelRendezvous(
            lambda epoch, unique_id: wire.NcclJoin(
                pair, epoch, peer.pool, unique_id, tuning.chunk_bytes, tuning.ctas_max
            )
        )
        self._open: _Open | None = None
        self._channel: Channel | None = None
        """The connection that interrupt() cuts."""

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
        with self._connection(watch, within) as (channel, pipe), torch.cuda.device(self._device):
            transfer = _Questions(self._memory, plan, channel, within, write=write)
            answers, parts = transfer.answers, len(transfer.parts)

            def idle() -> Deadline:
                return within(IDLE_S, IDLE_SETTING)

            def both() -> None:
                watch()
                answers.take_arrived()

            move = pipe.send if write else pipe.receive
            channel.send(transfer.question(0), idle())
            pieces = transfer.pieces(0)
            for index in range(parts):
                following = transfer.prepare(index + 1)  # the first while the owner checks
                if index == 0:
                    poll(lambda: answers.taken > 0, both, idle(), channel.peer, "answering")
                if following is not None:
                    channel.send(following[0], idle())
                move(pieces, both)
                if following is not None:
                    pieces = following[1]
            pipe.drain(both)
            poll(lambda: answers.taken > parts, both, idle(), channel.peer, "confirming the transfer")
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
        except _RefusedError:  # before anything was enqueued
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
        answers = _Answers(channel, lambda seconds, setting: deadline, *expected)

        def both() -> None:
            watch()
            answers.take_arrived()

        poll(lambda: answers.taken > 0, both, deadline, channel.peer, "answering")
        if pipe.exchange(pattern, both) != pattern:
            raise LinkError(f"{channel.peer} sent something else through NCCL than it was asked for")
        poll(lambda: answers.taken > 1, both, deadline, channel.peer, "confirming the exchange")


class _Questions:
    """One transfer: what to ask the owner, and where the bytes are on this side."""

    def __init__(self, memory: _Memory, plan: BlockCopyPlan, channel: Channel, within: Within, *, write: bool) -> None:
        if int(plan.nbytes.max()) > RUN_BYTES_MAX:
            plan = plan.split(RUN_BYTES_MAX)
        self._memory, self._plan, self._write = memory, plan, write
        most = [min(bound, PART_PIECES_MAX * memory.chunk_bytes) for bound in PART_BYTES_MAX]
        self.parts = list(parts(plan.nbytes, PART_RUNS_MAX, most))
        self.answers = _Answers(channel, within)
        self._total = 0

    def question(self, index: int) -> bytes:
        """Question number ``index``, made once and in order.

        Raises:
            TransferError: it names memory that one side does not have.
        """
        plan, part, memory = self._plan, self.parts[index], self._memory
        some = BlockCopyPlan(plan.grant, plan.region[part], plan.source[part], plan.target[part], plan.nbytes[part])
        sizes = memory.own_bytes, memory.peer_bytes
        check_bounds(some, *(sizes if self._write else sizes[::-1]))
        runs = encode_runs(some.region, some.target if self._write else some.source, some.nbytes)
        more, nbytes = index + 1 < len(self.parts), some.total_bytes
        self._total += nbytes
        self.answers.wanted.append(wire.Writing(nbytes) if self._write else wire.Reading(nbytes))
        if not more:
            self.answers.wanted.append(wire.Moved(self._total))
        return wire.encode((wire.NcclWrite if self._write else wire.NcclRead)(plan.grant, memory.peer, runs, more))

    def prepare(self, index: int) -> tuple[bytes, Pieces] | None:
        """Question number ``index`` and its pieces; None when there are not so many."""
        return (self.question(index), self.pieces(index)) if index < len(self.parts) else None

    def pieces(self, index: int) -> Pieces:
        """This side's memory for question number ``index``, which was made."""
        plan, part = self._plan, self.parts[index]
        own, nbytes = (plan.source if self._write else plan.target)[part], plan.nbytes[part]
        last = index + 1 == len(self.parts)
        sizes = message_sizes(int(nbytes.sum()), self._memory.chunk_bytes, first=index == 0, last=last)
        return cut(self._memory.addresses[plan.region[part]] + own, nbytes, sizes, ROW_BYTES_MAX)


class _Answers:
    """What the owner says to one transfer, in the order of ``wanted``."""

    def __init__(self, channel: Channel, within: Within, *wanted: wire.Answer) -> None:
        self._channel, self._within, self.wanted = channel, within, list(wanted)
        self.taken = 0

    def take_arrived(self) -> None:
        """Take what has arrived; does not wait. Raises _RefusedError, TransferError, Corrupt or PeerGone."""
        while self._channel.has_arrived():
            answer = receive_answer(self._channel, self._within(IDLE_S, IDLE_SETTING))
            if isinstance(answer, wire.Denied):
                kind = TransferError if self.taken else _RefusedError
                raise kind(f"{self._channel.peer} refused the transfer: {answer.reason} {answer.detail}".rstrip())
            if self.taken >= len(self.wanted) or answer != self.wanted[self.taken]:
                raise Corrupt(f"{self._channel.peer} answered something else than was expected next")
            self.taken += 1


class _RefusedError(TransferError):
    """The owner refused a transfer of which nothing had been enqueued."""


def _both(watch: Watch, channel: Channel) -> Callable[[], None]:
    """Ends a wait also when the owner closes the connection."""

    def both() -> None:
        watch()
        channel.has_arrived()

    return both
