"""CUDA IPC: a kernel on this side's GPU copies blocks from or to the peer's GPU memory, through an IPC mapping.

One host; GPUs that reach one another (NVLink, PCIe peer to peer) or are the same. The owner does nothing while memory
is read, and may even be stopped: whether the registration stood all the time is told by a nonce in its device memory,
which it clears before it withdraws memory and which the reader fetches behind each copy on the same stream: one-sided,
and cheaper than a question. A connection stays open for as long as the memory is mapped. When either side closes it, or
dies, the reader unmaps at once, and withdraw() waits for that up to DETACH_S: CUDA leaves it undefined what becomes of
memory that is freed while others map it. A write needs the owner's permission for each piece. IPC mappings are writable
by every process that was given the handle: like process_vm_readv, this is for processes that trust each other.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta, Struct

from vllm_fleet.core import limits
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import Corrupt, FleetError, LinkError
from vllm_fleet.fabric.contract import Capabilities, KVPool
from vllm_fleet.fabric.endpoint import Endpoint, ask
from vllm_fleet.fabric.owner import OwnedPool
from vllm_fleet.fabric.transports.cma import host_id, process_started
from vllm_fleet.fabric.transports.cuda import driver
from vllm_fleet.fabric.transports.cuda.direct import IpcLink
from vllm_fleet.fabric.transports.cuda.mapping import Exported, Mapping, Nonce, export_pool
from vllm_fleet.fabric.transports.cuda.watch import Hangups
from vllm_fleet.net.channel import Channel, connect
from vllm_fleet.wire import fabric as wire
from vllm_fleet.wire.fabric import PoolHandle
from vllm_fleet.wire.names import DECODE_ERRORS, Count, Port

if TYPE_CHECKING:
    from vllm_fleet.fabric.transports.cuda.reader import IpcCopier  # imports torch and triton

DETACH_S = 2.0
"""How long withdraw() waits for readers to unmap; then it goes on without them."""

DETAILS_BYTES_MAX = 64 << 10  # of a PoolHandle


class CudaIpcDetails(Struct, frozen=True):
    """The cuda_ipc part of a PoolHandle."""

    host: Annotated[str, Meta(max_length=limits.ID_LEN_MAX)]
    """Boot and PID namespace (cma.host_id); the boot must be the reader's."""
    pid: Count
    started: Count
    address: Annotated[str, Meta(min_length=1, max_length=255)]
    port: Port
    exported: Exported


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(CudaIpcDetails).decode


class CudaIpcTransport:
    """See the module's docstring."""

    name = "cuda_ipc"
    capabilities = Capabilities(cpu=False, cuda=True, one_sided=True, same_host=True, sms=64)

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._owned = OwnedPool(endpoint)
        self._nonce: Nonce | None = None
        self._links: list[IpcLink] = []
        self._changed = threading.Condition()  # guards what follows; told when a reader has left
        self._readers: set[Channel] = set()
        self._stragglers = False  # a reader did not unmap in time: the nonce's memory is never freed
        self._hangups: Hangups | None = None
        endpoint.handle(wire.Map, self._serve_map)
        endpoint.handle(wire.Permit, self._serve_permit)
        endpoint.on_lost(self._lost)

    def register(self, pool: KVPool) -> PoolHandle:
        device = pool.cuda
        if device is None:
            raise LinkError("cuda_ipc moves CUDA memory only, and the pool is in CPU memory; use cma or tcp")
        self.withdraw()
        from vllm_fleet.fabric.transports.cuda.reader import warm_up

        if self._nonce is None or self._nonce.device != device:
            self._free_nonce()
            self._nonce = Nonce(device)
        exported = export_pool(pool, device, self._nonce)
        warm_up(device)
        pid = os.getpid()
        details = _encode(
            CudaIpcDetails(
                host_id(), pid, process_started(pid), self._endpoint.host, int(self._endpoint.port), exported
            )
        )
        if len(details) > DETAILS_BYTES_MAX:
            raise LinkError(f"the pool's cuda_ipc handle takes {len(details)} bytes, more than {DETAILS_BYTES_MAX}")
        return PoolHandle(self.name, self._owned.register(pool), pool.sizes, details)

    def withdraw(self) -> None:
        self._owned.withdraw()
        if self._nonce is not None:
            with contextlib.suppress(LinkError):  # a broken CUDA context: nobody can be served from it either
                self._nonce.clear()
        self._detach_readers()
        with self._changed:
            links, self._links = self._links, []
            hangups, self._hangups = self._hangups, None
        for link in links:
            link.close()
        if hangups is not None:
            hangups.close()

    def connect(self, peer: PoolHandle, deadline: Deadline) -> IpcLink:
        pool = self._owned.pool
        if pool is None or pool.cuda is None:
            raise LinkError("register a pool before connecting")
        try:
            details = _decode(peer.details)
        except DECODE_ERRORS as error:
            raise LinkError(f"the peer's cuda_ipc handle cannot be read: {error}") from error
        _check_reach(details, peer, pool.cuda)
        where = f"{details.address}:{details.port}"
        try:
            channel = connect(details.address, details.port, self._endpoint.credentials, deadline)
        except FleetError as error:
            raise LinkError(f"no connection to the owner of the memory, {where}: {error}") from error
        try:
            copier = self._map(pool, peer, details.exported, channel, deadline)
        except FleetError as error:
            channel.close()
            raise LinkError(f"no cuda_ipc link to {where}: {error}") from error
        link = IpcLink(self.name, where, copier)
        with self._changed:
            self._links.append(link)
        if self._owned.pool is not pool:
            link.close()
            raise LinkError("the own pool was withdrawn meanwhile")
        return link

    def close(self) -> None:
        self.withdraw()
        self._free_nonce()

    def _map(
        self, pool: KVPool, peer: PoolHandle, exported: Exported, channel: Channel, deadline: Deadline
    ) -> IpcCopier:
        """What copies over a connection whose owner agrees; proved by a read."""
        from vllm_fleet.fabric.transports.cuda.reader import IpcCopier

        assert pool.cuda is not None
        _ask_to_map(channel, peer.pool, deadline)
        mapping = Mapping(pool.cuda, exported, peer.region_bytes)
        try:
            copier = IpcCopier(pool, peer, mapping, exported.nonce, channel, self._watch())
        except BaseException:
            mapping.close()
            raise
        try:
            copier.probe()
        except BaseException:
            copier.close()
            raise
        return copier

    def _watch(self) -> Hangups:
        with self._changed:
            if self._hangups is None:
                self._hangups = Hangups("fleet-cuda_ipc-watch")
            return self._hangups

    def _free_nonce(self) -> None:
        nonce, self._nonce = self._nonce, None
        if nonce is not None:
            nonce.close(free=not self._stragglers)

    def _serve_map(self, channel: Channel, question: wire.Question) -> wire.Answer:
        assert isinstance(question, wire.Map)
        with self._changed:  # withdraw() takes the registration back before it looks at the readers
            if not self._owned.is_current(question.pool):
                return wire.Denied("stale_pool")
            self._readers.add(channel)
        return wire.Mapped(question.pool)

    def _serve_permit(self, channel: Channel, question: wire.Question) -> wire.Answer:
        assert isinstance(question, wire.Permit)
        runs = self._owned.check(question.pool, question.grant, question.runs, write=True)
        return runs if isinstance(runs, wire.Denied) else wire.Permitted(runs.total_bytes)

    def _lost(self, channel: Channel) -> None:
        with self._changed:
            self._readers.discard(channel)
            self._changed.notify_all()

    def _detach_readers(self) -> None:
        """Tell everyone who maps our memory to unmap it, and wait until they have."""
        with self._changed:
            readers = set(self._readers)
            for channel in readers:
                with contextlib.suppress(OSError):  # it has just left
                    channel.socket.shutdown(socket.SHUT_WR)
            if not self._changed.wait_for(lambda: readers.isdisjoint(self._readers), DETACH_S):
                self._stragglers = True
            left = readers & self._readers
        for channel in left:
            channel.abort()


def _check_reach(details: CudaIpcDetails, peer: PoolHandle, device: int) -> None:
    """LinkError when it is plain before anything is tried that the peer's memory cannot be mapped."""
    if len(details.exported.places) != len(peer.region_bytes):
        raise LinkError("the peer's cuda_ipc handle is inconsistent")
    here = host_id()
    if details.host.partition("/")[0] != here.partition("/")[0]:
        raise LinkError("the peer is on another host: CUDA IPC works within one")
    if (details.host, details.pid, details.started) == (here, os.getpid(), process_started(os.getpid())):
        raise LinkError("the peer is this very process, whose own memory CUDA cannot map by IPC; use memory")
    other = driver.find_device(details.exported.uuid)  # None: hidden by CUDA_VISIBLE_DEVICES, mapping may still work
    if other is not None and not driver.can_access_peer(device, other):
        raise LinkError(f"CUDA devices {device} and {other} cannot reach each other's memory; use nccl or tcp")


def _ask_to_map(channel: Channel, pool: str, deadline: Deadline) -> None:
    answer = ask(channel, wire.Map(pool), deadline)
    if isinstance(answer, wire.Denied):
        raise LinkError(f"{channel.peer} has withdrawn that memory: {answer.reason}")
    if answer != wire.Mapped(pool):
        raise Corrupt(f"{channel.peer} answered something else than that the memory may be mapped")
