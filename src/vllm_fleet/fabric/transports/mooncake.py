"""Mooncake: reads and writes carried out by Mooncake's TransferEngine, over TCP or RDMA.

A link has an engine of its own: Mooncake cannot stop what is under way, so a cancelled transfer that does not end by
itself ends with its engine, and nobody else is touched. Over TCP a link's engine registers no memory: nothing of the
asking side can be reached through it.

Sockets: every engine listens on two ports of all interfaces, one for its handshake and one for data, and neither
authenticates who connects (seen with 0.3.13; no setting binds them, MC_TCP_BIND_ADDRESS changes only the address that
is told to others). Whoever reaches the data port can read and write the registered memory; the library checks that
addresses are inside it. Permission and standing are asked for on our own authenticated connection (fabric/control.py),
which honest peers heed. Use this transport inside a network you trust, behind a firewall; ``tcp`` needs none.

The library writes its log to standard error; MC_LOG_LEVEL=ERROR in the environment silences most of it.
"""

from __future__ import annotations

import secrets
import threading
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta, Struct

from vllm_fleet.core import limits
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import ConfigError, FleetError, LinkError
from vllm_fleet.fabric.contract import Capabilities, KVPool
from vllm_fleet.fabric.control import Control, serve_checks
from vllm_fleet.fabric.endpoint import Endpoint
from vllm_fleet.fabric.machine import has_rdma
from vllm_fleet.fabric.owner import OwnedPool
from vllm_fleet.fabric.transports.mooncake_engine import Engine, library
from vllm_fleet.fabric.transports.mooncake_link import NONCE_BYTES, MooncakeCopier, Theirs
from vllm_fleet.fabric.work import WorkLink
from vllm_fleet.wire import fabric as wire
from vllm_fleet.wire.fabric import PoolHandle
from vllm_fleet.wire.names import DECODE_ERRORS, Count, Port


class MooncakeDetails(Struct, frozen=True):
    """The mooncake part of a PoolHandle. Addresses are given to the library only, whose owner side checks them."""

    host: Annotated[str, Meta(min_length=1, max_length=255)]
    port: Port
    """The owner's endpoint, for the control connection."""
    session: Annotated[str, Meta(min_length=1, max_length=limits.ID_LEN_MAX)]
    protocol: Literal["tcp", "rdma"]
    addresses: Annotated[tuple[Count, ...], Meta(max_length=limits.REGIONS_MAX)]
    nonce_address: Count
    nonce: Annotated[bytes, Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(MooncakeDetails).decode


class MooncakeTransport:
    """See the module's docstring.

    ``protocol``: "tcp" or "rdma". ``metadata``: "P2PHANDSHAKE", or the address of a metadata server
    (http://host:port/metadata, etcd://host:port). ``devices``: RDMA devices, comma-separated; all when empty.
    """

    name = "mooncake"
    capabilities = Capabilities(cpu=True, cuda=True, one_sided=False, same_host=False)

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        protocol: Literal["tcp", "rdma"] = "tcp",
        metadata: str = "P2PHANDSHAKE",
        devices: str = "",
    ) -> None:
        self._supports_cuda = bool(library().SUPPORT_CUDA)
        if protocol not in ("tcp", "rdma"):
            raise ConfigError(f"fabric.mooncake.protocol: expected tcp or rdma, found {protocol!r}")
        if protocol == "rdma" and not has_rdma():
            raise ConfigError(
                "fabric.mooncake.protocol: rdma needs an RDMA device, and this machine has none "
                "(/sys/class/infiniband is empty); use tcp"
            )
        self._endpoint = endpoint
        self._protocol: Literal["tcp", "rdma"] = protocol
        self._metadata = metadata
        self._devices = devices
        self._owned = OwnedPool(endpoint)
        self._engine: Engine | None = None
        self._nonce = np.zeros(NONCE_BYTES, np.uint8)
        self._links: list[WorkLink] = []
        self._lock = threading.Lock()
        serve_checks(endpoint, self._owned, wire.MooncakeCheck)

    def register(self, pool: KVPool) -> PoolHandle:
        if pool.cuda is not None and not self._supports_cuda:
            raise LinkError(
                "this build of mooncake moves CPU memory only, and the pool is in CUDA memory; "
                "install mooncake-transfer-engine in the place of mooncake-transfer-engine-non-cuda"
            )
        self.withdraw()
        engine = self._make_engine()
        nonce = secrets.token_bytes(NONCE_BYTES)
        self._nonce = np.frombuffer(bytearray(nonce), np.uint8)
        addresses = [region.address for region in pool.regions]
        engine.register([*addresses, int(self._nonce.ctypes.data)], [*pool.sizes, NONCE_BYTES])
        self._engine = engine
        details = MooncakeDetails(
            self._endpoint.host,
            self._endpoint.port,
            engine.session,
            self._protocol,
            tuple(addresses),
            int(self._nonce.ctypes.data),
            nonce,
        )
        return PoolHandle(self.name, self._owned.register(pool), pool.sizes, _encode(details))

    def withdraw(self) -> None:
        self._owned.withdraw()
        with self._lock:
            links, self._links = self._links, []
            engine, self._engine = self._engine, None
        for link in links:
            link.close()
        if engine is not None:
            engine.destroy()  # not only unregistered: what is under way ends before the memory is freed

    def connect(self, peer: PoolHandle, deadline: Deadline) -> WorkLink:
        pool = self._owned.pool
        if pool is None:
            raise LinkError("register a pool before connecting")
        try:
            details = _decode(peer.details)
        except DECODE_ERRORS as error:
            raise LinkError(f"the peer's mooncake handle cannot be read: {error}") from error
        if len(details.addresses) != len(peer.region_bytes):
            raise LinkError("the peer's mooncake handle is inconsistent")
        if details.protocol != self._protocol:
            raise LinkError(f"the peer's mooncake uses {details.protocol} and this side's {self._protocol}")
        control = Control(details.host, details.port, self._endpoint.credentials, peer.pool)
        theirs = Theirs(details.session, details.addresses, peer.region_bytes, details.nonce_address, details.nonce)
        copier = MooncakeCopier(control, theirs, pool, self._make_engine, registers=self._protocol == "rdma")
        try:
            copier.open(deadline)
        except FleetError as error:
            copier.close()
            raise LinkError(f"no mooncake link to {control.peer}: {error}") from error
        link = WorkLink(self.name, control.peer, copier)
        with self._lock:
            self._links.append(link)
        return link

    def close(self) -> None:
        self.withdraw()

    def _make_engine(self) -> Engine:
        name = f"{self._endpoint.host}-{secrets.token_hex(8)}"
        return Engine(self._endpoint.host, self._protocol, self._metadata, self._devices, name)
