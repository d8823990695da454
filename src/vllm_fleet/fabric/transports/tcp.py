"""TCP: the owner sends straight from its KV memory, the reader receives straight into its own. No staging copy.

GPU memory goes through pinned host memory on its side, GPU copy and network overlapped.

A link is one authenticated connection to the owner's endpoint. The asking side names runs of a registered pool; the
owner checks that they are inside its regions and granted, and sends or takes exactly their bytes. Works between any two
hosts.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta, Struct

from vllm_fleet.core import limits
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import Corrupt, FleetError, LinkError
from vllm_fleet.fabric.contract import Capabilities, KVPool, TransferError
from vllm_fleet.fabric.endpoint import ANSWER_S, ANSWER_SETTING, Endpoint, ask, probe, receive_answer
from vllm_fleet.fabric.owner import OwnedPool, encode_runs
from vllm_fleet.fabric.plan import BlockCopyPlan, Ints
from vllm_fleet.fabric.scattered import Bytes, bytes_of
from vllm_fleet.fabric.work import WorkLink, check_bounds
from vllm_fleet.net.channel import Channel, Credentials, connect
from vllm_fleet.net.scatter import off_the_senders_cpu
from vllm_fleet.wire import fabric as wire
from vllm_fleet.wire.fabric import PoolHandle
from vllm_fleet.wire.names import DECODE_ERRORS, Port

IDLE_S = 10.0
"""A transfer fails when no byte moves for this long."""

RECONNECT_S = 2.0
IDLE_SETTING = "fabric.transports.tcp.IDLE_S"

FIRST_RUNS = 64
"""Runs of a transfer's first question: few, so that bytes flow while the others are prepared."""

PIECE_RUNS_MAX = 1024
"""Runs of one question: 24 KiB, which fit the owner's socket buffer while it still sends what was asked before."""

PIECE_BYTES_MAX = 1 << 30

APART_BYTES_MIN = 4 << 20
"""Shorter transfers are over before the two sides could hinder each other."""


class TcpDetails(Struct, frozen=True):
    """The tcp part of a PoolHandle."""

    host: Annotated[str, Meta(min_length=1, max_length=255)]
    port: Port


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(TcpDetails).decode


class TcpTransport:
    """See the module's docstring."""

    name = "tcp"
    capabilities = Capabilities(cpu=True, cuda=True, one_sided=False, same_host=False)

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._owned = OwnedPool(endpoint)
        self._links: list[WorkLink] = []
        self._serving: dict[Channel, Bytes] = {}
        self._lock = threading.Lock()
        endpoint.handle(wire.Read, self._serve_read)
        endpoint.handle(wire.Write, self._serve_write)
        endpoint.on_lost(self._lost)

    def register(self, pool: KVPool) -> PoolHandle:
        bytes_of(pool).close()  # a missing library shows here, not with the first transfer
        self._close_links()
        details = TcpDetails(self._endpoint.host, self._endpoint.port)
        return PoolHandle(self.name, self._owned.register(pool), pool.sizes, _encode(details))

    def withdraw(self) -> None:
        self._owned.withdraw()
        self._close_links()

    def connect(self, peer: PoolHandle, deadline: Deadline) -> WorkLink:
        pool = self._owned.pool
        if pool is None:
            raise LinkError("register a pool before connecting")
        try:
            details = _decode(peer.details)
        except DECODE_ERRORS as error:
            raise LinkError(f"the peer's tcp handle cannot be read: {error}") from error
        copier = _Copier(details, peer, pool, self._endpoint.credentials)
        try:
            copier.open(deadline)
        except FleetError as error:
            copier.close()
            raise LinkError(f"no tcp link to {details.host}:{details.port}: {error}") from error
        link = WorkLink(self.name, f"{details.host}:{details.port}", copier)
        with self._lock:
            self._links.append(link)
        return link

    def close(self) -> None:
        self.withdraw()

    def _close_links(self) -> None:
        with self._lock:
            links, self._links = self._links, []
        for link in links:
            link.close()

    def _serve_read(self, channel: Channel, question: wire.Question) -> wire.Answer | None:
        assert isinstance(question, wire.Read)
        runs = self._owned.check(question.pool, question.grant, question.runs)
        if isinstance(runs, wire.Denied):
            return runs
        header = wire.encode(wire.Reading(runs.total_bytes))
        channel.send(header, Deadline.after(ANSWER_S, ANSWER_SETTING))
        self._bytes_for(channel, runs.pool).send(channel, runs.addresses, runs.nbytes, IDLE_S)
        return self._moved(question.pool, runs.total_bytes)

    def _serve_write(self, channel: Channel, question: wire.Question) -> wire.Answer | None:
        assert isinstance(question, wire.Write)
        runs = self._owned.check(question.pool, question.grant, question.runs, write=True)
        if isinstance(runs, wire.Denied):
            return runs
        header = wire.encode(wire.Writing(runs.total_bytes))
        channel.send(header, Deadline.after(ANSWER_S, ANSWER_SETTING))
        with _apart(channel, runs.total_bytes):
            self._bytes_for(channel, runs.pool).receive(channel, runs.addresses, runs.nbytes, IDLE_S)
        return self._moved(question.pool, runs.total_bytes)

    def _moved(self, pool: str, nbytes: int) -> wire.Answer:
        return wire.Moved(nbytes) if self._owned.is_current(pool) else wire.Denied("stale_pool")

    def _bytes_for(self, channel: Channel, pool: KVPool) -> Bytes:
        """What a connection's transfers go through; one thread serves a connection."""
        with self._lock:
            found = self._serving.get(channel)
            if found is None or found.cuda != pool.cuda:
                found = self._serving[channel] = bytes_of(pool)
        return found

    def _lost(self, channel: Channel) -> None:
        with self._lock:
            served = self._serving.pop(channel, None)
        if served is not None:
            served.close()


class _Copier:
    """The asking end of one link: one connection, made again after a failure."""

    def __init__(self, details: TcpDetails, peer: PoolHandle, pool: KVPool, credentials: Credentials) -> None:
        self._details = details
        self._peer = peer
        self._pool = pool
        self._credentials = credentials
        self._addresses = np.array([region.address for region in pool.regions], np.int64)
        self._own_bytes = np.array(pool.sizes, np.int64)
        self._peer_bytes = np.array(peer.region_bytes, np.int64)
        self._channel: Channel | None = None
        self._bytes = bytes_of(pool)

    def open(self, deadline: Deadline) -> Channel:
        """Connect, proving the token both ways, and ask whether the peer's registration stands."""
        channel = connect(self._details.host, self._details.port, self._credentials, deadline)
        try:
            probe(channel, self._peer.pool, deadline)
        except BaseException:
            channel.close()
            raise
        self._channel = channel
        return channel

    def read(self, plan: BlockCopyPlan, cancelled: threading.Event) -> None:
        if not len(plan):
            return
        check_bounds(plan, self._peer_bytes, self._own_bytes)
        with self._connection(cancelled) as channel:
            first = slice(0, min(FIRST_RUNS, len(plan)))
            self._ask_read(channel, plan, first)
            own = self._addresses[plan.region] + plan.target
            pieces = [first, *plan.pieces(PIECE_RUNS_MAX, PIECE_BYTES_MAX, start=first.stop)]
            for index, piece in enumerate(pieces):
                if index + 1 < len(pieces):  # the owner finds the next question when it has answered this one
                    self._ask_read(channel, plan, pieces[index + 1])
                if cancelled.is_set():
                    raise TransferError("the transfer was cancelled")
                self._take(channel, plan, piece, own)

    def write(self, plan: BlockCopyPlan, cancelled: threading.Event) -> None:
        if not len(plan):
            return
        check_bounds(plan, self._own_bytes, self._peer_bytes)
        own = self._addresses[plan.region] + plan.source
        with self._connection(cancelled) as channel:
            for piece in plan.pieces(limits.RUNS_MAX, PIECE_BYTES_MAX):
                if cancelled.is_set():
                    raise TransferError("the transfer was cancelled")
                self._push(channel, plan, piece, own)

    @contextlib.contextmanager
    def _connection(self, cancelled: threading.Event) -> Iterator[Channel]:
        """The connection, made again if it is lost; lost when a transfer ends early, since bytes may be under way."""
        channel = self._channel
        if channel is not None and not channel.is_open():  # cut by an interrupt() that came as the last copy ended
            self._channel = None
            channel.close()
            channel = None
        if channel is None:
            channel = self.open(_idle().capped(RECONNECT_S))
        try:
            yield channel
        except BaseException:
            self._channel = None
            channel.reset()
            raise

    def _ask_read(self, channel: Channel, plan: BlockCopyPlan, piece: slice) -> None:
        runs = encode_runs(plan.region[piece], plan.source[piece], plan.nbytes[piece])
        channel.send(wire.encode(wire.Read(plan.grant, self._peer.pool, runs)), _idle())

    def _take(self, channel: Channel, plan: BlockCopyPlan, piece: slice, own: Ints) -> None:
        answer = receive_answer(channel, _idle())
        wanted = int(plan.nbytes[piece].sum())
        _expect(answer, wire.Reading(wanted), channel.peer)
        with _apart(channel, plan.total_bytes):
            self._bytes.receive(channel, own[piece], plan.nbytes[piece], IDLE_S)
        _expect(receive_answer(channel, _idle()), wire.Moved(wanted), channel.peer)

    def _push(self, channel: Channel, plan: BlockCopyPlan, piece: slice, own: Ints) -> None:
        runs = encode_runs(plan.region[piece], plan.target[piece], plan.nbytes[piece])
        total = int(plan.nbytes[piece].sum())
        answer = ask(channel, wire.Write(plan.grant, self._peer.pool, runs), _idle())
        _expect(answer, wire.Writing(total), channel.peer)
        self._bytes.send(channel, own[piece], plan.nbytes[piece], IDLE_S)
        _expect(receive_answer(channel, _idle()), wire.Moved(total), channel.peer)

    def interrupt(self) -> None:
        channel = self._channel
        if channel is not None:
            channel.abort()

    def close(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()
        self._bytes.close()


def _apart(channel: Channel, nbytes: int) -> contextlib.AbstractContextManager[None]:
    """For what takes longer than a millisecond."""
    return off_the_senders_cpu(channel.socket) if nbytes >= APART_BYTES_MIN else contextlib.nullcontext()


def _idle() -> Deadline:
    return Deadline.after(IDLE_S, IDLE_SETTING)


def _expect(answer: wire.Answer, wanted: wire.Answer, peer: str) -> None:
    if isinstance(answer, wire.Denied):
        raise TransferError(f"{peer} refused the transfer: {answer.reason} {answer.detail}".rstrip())
    if answer != wanted:
        raise Corrupt(f"{peer} answered something else than {wanted}")
