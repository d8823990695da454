"""TCP: the owner sends straight from its KV memory, the reader receives straight into its own. No staging copy.

A link is one authenticated connection to the owner's endpoint. The reader names runs of a registered pool; the owner
checks that they are inside its regions and granted, and answers with exactly their bytes. Works between any two hosts.
"""

from __future__ import annotations

import ctypes
import secrets
import threading
from collections.abc import Callable, Iterable
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta, Struct

from vllm_fleet.core import limits
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import Corrupt, FleetError, LinkError
from vllm_fleet.fabric.contract import KVPool, TransferError
from vllm_fleet.fabric.endpoint import ANSWER_S, ANSWER_SETTING, Endpoint, ask
from vllm_fleet.fabric.plan import BlockCopyPlan, Ints
from vllm_fleet.fabric.work import WorkLink, check_bounds
from vllm_fleet.net.channel import Channel, Credentials, connect
from vllm_fleet.wire import fabric as wire
from vllm_fleet.wire.fabric import PoolHandle
from vllm_fleet.wire.names import DECODE_ERRORS, Port

IDLE_S = 10.0
"""A transfer fails when no byte moves for this long."""

PIECE_BYTES_MAX = 1 << 30

Grant = Callable[[str, Ints, Ints, Ints], bool]
"""Whether a grant covers runs: (grant, regions, offsets in bytes, lengths in bytes), arrays of shape [runs]."""


class TcpDetails(Struct, frozen=True):
    """The tcp part of a PoolHandle."""

    host: Annotated[str, Meta(min_length=1, max_length=255)]
    port: Port


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(TcpDetails).decode


def _view(address: int, nbytes: int) -> memoryview:
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


class TcpTransport:
    """See the module's docstring. ``grant`` decides which reads the owner answers (default: all)."""

    name = "tcp"

    def __init__(self, endpoint: Endpoint) -> None:
        self.grant: Grant = lambda grant, regions, offsets, nbytes: True
        self._endpoint = endpoint
        self._pool: KVPool | None = None
        self._pool_id = ""
        self._views: list[memoryview] = []
        self._links: list[WorkLink] = []
        self._lock = threading.Lock()
        endpoint.handle(wire.Read, self._serve)

    def register(self, pool: KVPool) -> PoolHandle:
        with self._lock:
            self._pool, self._pool_id = pool, secrets.token_hex(16)
            self._views = [_view(region.address, region.nbytes) for region in pool.regions]
        details = TcpDetails(self._endpoint.host, self._endpoint.port)
        return PoolHandle(self.name, self._pool_id, tuple(r.nbytes for r in pool.regions), _encode(details))

    def connect(self, peer: PoolHandle, deadline: Deadline) -> WorkLink:
        if self._pool is None:
            raise LinkError("register a pool before connecting")
        try:
            details = _decode(peer.details)
        except DECODE_ERRORS as error:
            raise LinkError(f"the peer's tcp handle cannot be read: {error}") from error
        receiver = _Receiver(details, peer, self._views, self._pool, self._endpoint.credentials)
        try:
            receiver.open(deadline)
        except FleetError as error:
            raise LinkError(f"no tcp link to {details.host}:{details.port}: {error}") from error
        link = WorkLink(self.name, f"{details.host}:{details.port}", receiver.copy, receiver.interrupt)
        with self._lock:
            self._links.append(link)
        return link

    def close(self) -> None:
        with self._lock:
            links, self._links = self._links, []
            self._pool, self._pool_id, self._views = None, "", []
        for link in links:
            link.close()

    def _serve(self, channel: Channel, question: wire.Question) -> wire.Answer | None:
        assert isinstance(question, wire.Read)
        if len(question.runs) % wire.RUN_BYTES:
            raise Corrupt(f"{len(question.runs)} bytes are no whole number of runs")
        runs = np.frombuffer(question.runs, "<i8").reshape(-1, 3)
        region, offset, nbytes = runs[:, 0], runs[:, 1], runs[:, 2]
        with self._lock:
            views, pool_id = self._views, self._pool_id
        if question.pool != pool_id:
            return wire.Denied("stale_pool")
        sizes = np.array([len(view) for view in views], np.int64)
        inside = (region >= 0) & (region < len(sizes)) & (offset >= 0) & (nbytes > 0)
        if not bool(inside.all()) or not bool((nbytes <= sizes[region] - offset).all()):
            return wire.Denied("out_of_range")
        if not self.grant(question.grant, region, offset, nbytes):
            return wire.Denied("not_granted")
        header = wire.encode(wire.Reading(int(nbytes.sum())))
        channel.send(header, Deadline.after(ANSWER_S, ANSWER_SETTING))
        _send(channel, _slices(views, region, offset, nbytes))
        return None


def _slices(views: list[memoryview], region: Ints, offset: Ints, nbytes: Ints) -> list[memoryview]:
    triples = zip(region.tolist(), offset.tolist(), (offset + nbytes).tolist(), strict=True)
    return [views[index][start:stop] for index, start, stop in triples]


def _batches(buffers: list[memoryview]) -> Iterable[list[memoryview]]:
    for start in range(0, len(buffers), limits.IOV_MAX):
        yield buffers[start : start + limits.IOV_MAX]


def _advance(batch: list[memoryview], moved: int) -> list[memoryview]:
    """What is left of ``batch`` after its first ``moved`` bytes."""
    for index, buffer in enumerate(batch):
        if moved < len(buffer):
            return [buffer[moved:], *batch[index + 1 :]]
        moved -= len(buffer)
    return []


def _send(channel: Channel, buffers: list[memoryview]) -> None:
    channel.socket.settimeout(IDLE_S)
    for batch in _batches(buffers):
        left = batch
        while left:
            try:
                left = _advance(left, channel.socket.sendmsg(left))
            except OSError as error:
                raise TransferError(f"sending to {channel.peer} failed: {error}") from error


class _Receiver:
    """The reading end of one link: one connection, made again after a failure."""

    def __init__(
        self, details: TcpDetails, peer: PoolHandle, views: list[memoryview], pool: KVPool, credentials: Credentials
    ) -> None:
        self._details = details
        self._peer = peer
        self._views = views
        self._credentials = credentials
        self._source_bytes = np.array(peer.region_bytes, np.int64)
        self._target_bytes = np.array([region.nbytes for region in pool.regions], np.int64)
        self._channel: Channel | None = None

    def open(self, deadline: Deadline) -> Channel:
        """Connect and prove with a question and its answer that the peer serves this fabric."""
        channel = connect(self._details.host, self._details.port, self._credentials, deadline)
        try:
            answer = ask(channel, wire.Ping(), deadline)
            if not isinstance(answer, wire.Pong):
                raise Corrupt(f"{channel.peer} answered a ping with {type(answer).__name__}")
        except BaseException:
            channel.close()
            raise
        self._channel = channel
        return channel

    def interrupt(self) -> None:
        """Wake the thread that receives; the connection is lost, since bytes may be under way."""
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def copy(self, plan: BlockCopyPlan, cancelled: threading.Event) -> None:
        if not len(plan):
            return
        check_bounds(plan, self._source_bytes, self._target_bytes)
        deadline = Deadline.after(IDLE_S, "fabric.transports.tcp.IDLE_S")
        channel = self._channel
        if channel is None:
            channel = self.open(deadline)
        if cancelled.is_set():
            return
        try:
            for piece in plan.pieces(limits.RUNS_MAX, PIECE_BYTES_MAX):
                self._read(channel, plan, piece, cancelled)
        except BaseException:
            self._channel = None
            channel.close()
            raise

    def _read(self, channel: Channel, plan: BlockCopyPlan, piece: slice, cancelled: threading.Event) -> None:
        deadline = Deadline.after(IDLE_S, "fabric.transports.tcp.IDLE_S")
        region, nbytes = plan.region[piece], plan.nbytes[piece]
        runs = np.ascontiguousarray(np.stack([region, plan.source[piece], nbytes], axis=1), "<i8").tobytes()
        answer = ask(channel, wire.Read(plan.grant, self._peer.pool, runs), deadline)
        if isinstance(answer, wire.Denied):
            raise TransferError(f"{channel.peer} refused the read: {answer.reason} {answer.detail}".rstrip())
        wanted = int(nbytes.sum())
        if not isinstance(answer, wire.Reading) or answer.nbytes != wanted:
            raise Corrupt(f"{channel.peer} announced something else than the {wanted} bytes asked for")
        _receive(channel, _slices(self._views, region, plan.target[piece], nbytes), cancelled)


def _receive(channel: Channel, buffers: list[memoryview], cancelled: threading.Event) -> None:
    channel.socket.settimeout(IDLE_S)
    for batch in _batches(buffers):
        left = batch
        while left:
            if cancelled.is_set():
                raise TransferError("the transfer was cancelled")
            try:
                moved = channel.socket.recvmsg_into(left)[0]
            except TimeoutError as error:
                raise TransferError(f"{channel.peer} sent nothing for {IDLE_S:.0f} s") from error
            except OSError as error:
                raise TransferError(f"the connection to {channel.peer} broke: {error}") from error
            if moved == 0:
                raise TransferError(f"{channel.peer} closed the connection in the middle of a transfer")
            left = _advance(left, moved)
