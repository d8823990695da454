"""NIXL: reads and writes carried out by NVIDIA's transfer library over UCX (RDMA, shared memory, CUDA IPC, TCP).

A link has an agent of its own. NIXL's release of a running request does not stop it (seen with 1.5.1 over TCP: bytes
landed after releaseXferReq and invalidateRemoteMD), so the only way to stop one is to end its agent; with one agent for
each link that touches nobody else. The price is that a pool is registered once more for each link.

Reads are pulled by the reader where UCX reads memory without the owner's help (same host, or RDMA on both sides).
Over plain TCP UCX emulates a read by sending from the owner's progress thread, and a reader that dies in the middle
takes the owner's process with it (seen with 1.5.1: segmentation fault, or "Fatal: unexpected error: Endpoint timeout"
in ucp_request.inl). A write has no such fault; so there the reader asks the owner to push.

Sockets: each agent's UCX listens on a TCP port of each network device it may use, and does not authenticate who
connects. With an endpoint on loopback, or on an address of one interface and no RDMA device, UCX is bound to that
interface (``NET_DEVICES``); else to all it finds. Permission and standing are asked for on our own authenticated
connection (fabric/control.py), but whoever reaches UCX's port and learns an agent's metadata, which only authenticated
peers are given, can reach the registered memory: keep UCX's ports inside a network you trust. UCX reads the routing
table once in a process's life (seen with NIXL 1.5.1): an interface that appears later serves no agent.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import msgspec

from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import FleetError, LinkError
from vllm_fleet.fabric.contract import Capabilities, KVPool
from vllm_fleet.fabric.control import Control, serve_checks
from vllm_fleet.fabric.endpoint import Endpoint
from vllm_fleet.fabric.owner import OwnedPool
from vllm_fleet.fabric.transports.nixl_agent import Agent, bindings
from vllm_fleet.fabric.transports.nixl_handle import (
    DETAILS_BYTES_MAX,
    NixlDetails,
    decode,
    encode,
    machine_facts,
    settle,
)
from vllm_fleet.fabric.transports.nixl_link import NixlCopier
from vllm_fleet.fabric.transports.nixl_push import Pusher
from vllm_fleet.fabric.work import WorkLink
from vllm_fleet.wire import fabric as wire
from vllm_fleet.wire.fabric import PoolHandle


class NixlTransport:
    """See the module's docstring.

    ``ucx``: UCX settings without their UCX_ prefix, for instance {"TLS": "tcp"} or {"NET_DEVICES": "mlx5_0:1"}.
    """

    name = "nixl"
    capabilities = Capabilities(cpu=True, cuda=True, one_sided=False, same_host=False)

    def __init__(self, endpoint: Endpoint, *, ucx: Mapping[str, str] | None = None) -> None:
        bindings()
        self._endpoint = endpoint
        self._ucx = settle(ucx or {}, endpoint.host)
        self._owned = OwnedPool(endpoint)
        self._pusher = Pusher(endpoint, self._owned)
        self._links: list[WorkLink] = []
        self._lock = threading.Lock()
        serve_checks(endpoint, self._owned, wire.NixlCheck)

    def register(self, pool: KVPool) -> PoolHandle:
        self.withdraw()
        agent = Agent(pool, self._ucx)
        details = encode(self._details(agent, pool))
        if len(details) > DETAILS_BYTES_MAX:
            agent.destroy()
            raise LinkError(
                f"nixl describes the {len(pool.regions)} regions of this pool in {len(details)} bytes, and a handle "
                f"holds {DETAILS_BYTES_MAX}; use fewer, larger regions, or another transport"
            )
        self._pusher.serve(agent)
        return PoolHandle(self.name, self._owned.register(pool), pool.sizes, details)

    def withdraw(self) -> None:
        self._owned.withdraw()
        with self._lock:
            links, self._links = self._links, []
        for link in links:
            link.close()
        self._pusher.stop()

    def connect(self, peer: PoolHandle, deadline: Deadline) -> WorkLink:
        pool = self._owned.pool
        if pool is None:
            raise LinkError("register a pool before connecting")
        theirs = decode(peer)
        control = Control(theirs.host, theirs.port, self._endpoint.credentials, peer.pool)
        copier = NixlCopier(control, peer, theirs, pool, self._details, self._ucx)
        try:
            copier.open(deadline)
        except FleetError as error:
            copier.close()
            raise LinkError(f"no nixl link to {control.peer}: {error}") from error
        link = WorkLink(self.name, control.peer, copier)
        with self._lock:
            self._links.append(link)
        return link

    def close(self) -> None:
        self.withdraw()

    def _details(self, agent: Agent, pool: KVPool) -> NixlDetails:
        facts = machine_facts(self._ucx)
        values = msgspec.structs.asdict(facts) | {
            "host": self._endpoint.host,
            "port": self._endpoint.port,
            "device": -1 if pool.cuda is None else pool.cuda,
            "addresses": tuple(region.address for region in pool.regions),
            "nonce_address": int(agent.nonce.ctypes.data),
            "nonce": agent.nonce.tobytes(),
            "landing_address": int(agent.landing.ctypes.data),
            "metadata": agent.metadata,
        }
        return NixlDetails(**values)
