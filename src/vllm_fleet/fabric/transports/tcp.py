"""TCP: the owner sends straight from its KV memory, the reader receives straight into its own. No staging copy.

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
from vllm_fleet.fabric.work import WorkLink, check_bounds
from vllm_fleet.net.channel import Channel, Credentials, connect
from vllm_fleet.net.scatter import receive_runs, send_runs
from vllm_fleet.wire import fabric as wire
from vllm_fleet.wire.fabric import PoolHandle
from vllm_fleet.wire.names import DECODE_ERRORS, Port

IDLE_S = 10.0
"""A transfer fails when no byte moves for this long."""

RECONNECT_S = 2.0
IDLE_SETTING = "fabric.transports.tcp.IDLE_S"

PIECE_RUNS_MAX = 1024
"""Runs of one question: 24 KiB, which fit the owner's socket buffer while it still sends what was asked before."""

PIECE_BYTES_MAX = 1 << 30


class TcpDetails(Struct, frozen=True):
    """The tcp part of a PoolHandle."""

    host: Annotated[str, Meta(min_length=1, max_length=255)]
    port: Port


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(TcpDetails).decode


class TcpTransport:
    """See the module's docstring."""

    name = "tcp"
    capabilities = Capabilities(cpu=True, cuda=False, one_sided=False, same_host=False)

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._owned = OwnedPool(endpoint)
        self._links: list[WorkLink] = []
        self._lock = threading.Lock()
        endpoint.handle(wire.Read, self._serve_read)
        endpoint.handle(wire.Write, self._serve_write)

    def register(self, pool: KVPool) -> PoolHandle:
        if pool.cuda is not None:
            raise LinkError("tcp moves CPU memory only in this version, and the pool is in CUDA memory")
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
        send_runs(channel.socket, runs.addresses, runs.nbytes, IDLE_S, channel.peer)
        return self._moved(question.pool, runs.total_bytes)

    def _serve_write(self, channel: Channel, question: wire.Question) -> wire.Answer | None:
        assert isinstance(question, wire.Write)
        runs = self._owned.check(question.pool, question.grant, question.runs, write=True)
        if isinstance(runs, wire.Denied):
            return runs
        header = wire.encode(wire.Writing(runs.total_bytes))
        channel.send(header, Deadline.after(ANSWER_S, ANSWER_SETTING))
        receive_runs(channel.socket, runs.addresses, runs.nbytes, IDLE_S, channel.peer)
        return self._moved(question.pool, runs.total_bytes)

    def _moved(self, pool: str, nbytes: int) -> wire.Answer:
        return wire.Moved(nbytes) if self._owned.is_current(pool) else wire.Denied("stale_pool")


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
        own = self._addresses[plan.region] + plan.target
        with self._connection(cancelled) as channel:
            pieces = list(plan.pieces(PIECE_RUNS_MAX, PIECE_BYTES_MAX))
            for index, piece in enumerate(pieces):
                if index == 0:
                    self._ask_read(channel, plan, piece)
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
        if channel is None:
            channel = self.open(_idle().capped(RECONNECT_S))
        try:
            yield channel
        except BaseException:
            self._channel = None
            channel.close()
            raise

    def _ask_read(self, channel: Channel, plan: BlockCopyPlan, piece: slice) -> None:
        runs = encode_runs(plan.region[piece], plan.source[piece], plan.nbytes[piece])
        channel.send(wire.encode(wire.Read(plan.grant, self._peer.pool, runs)), _idle())

    def _take(self, channel: Channel, plan: BlockCopyPlan, piece: slice, own: Ints) -> None:
        answer = receive_answer(channel, _idle())
        wanted = int(plan.nbytes[piece].sum())
        _expect(answer, wire.Reading(wanted), channel.peer)
        receive_runs(channel.socket, own[piece], plan.nbytes[piece], IDLE_S, channel.peer)
        _expect(receive_answer(channel, _idle()), wire.Moved(wanted), channel.peer)

    def _push(self, channel: Channel, plan: BlockCopyPlan, piece: slice, own: Ints) -> None:
        runs = encode_runs(plan.region[piece], plan.target[piece], plan.nbytes[piece])
        total = int(plan.nbytes[piece].sum())
        answer = ask(channel, wire.Write(plan.grant, self._peer.pool, runs), _idle())
        _expect(answer, wire.Writing(total), channel.peer)
        send_runs(channel.socket, own[piece], plan.nbytes[piece], IDLE_S, channel.peer)
        _expect(receive_answer(channel, _idle()), wire.Moved(total), channel.peer)

    def interrupt(self) -> None:
        channel = self._channel
        if channel is not None:
            channel.abort()

    def close(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()


def _idle() -> Deadline:
    return Deadline.after(IDLE_S, IDLE_SETTING)


def _expect(answer: wire.Answer, wanted: wire.Answer, peer: str) -> None:
    if isinstance(answer, wire.Denied):
        raise TransferError(f"{peer} refused the transfer: {answer.reason} {answer.detail}".rstrip())
    if answer != wanted:
        raise Corrupt(f"{peer} answered something else than {wanted}")
