"""NCCL: GPU memory between any two GPUs, of one host or of two, through communicators of two for each link.

The asking side names runs of a registered pool on an authenticated connection (as with tcp); the owner checks that they
are inside its regions and granted. The bytes then go gather -> staging -> ncclSend | ncclRecv -> staging -> scatter, in
pieces, both sides overlapping copies and wire (cuda/pipe.py). Two-sided: the owner's process must run. The thread that
waits for a read carries it out (cuda/nccl_link.py).

A cancel, a failure or a dead peer aborts the communicators, on both sides, so that no kernel is left that waits or
writes; the next transfer forms others with new unique ids (0.5 s). The unique ids pass through a Rendezvous.
NCCL's own sockets are not authenticated: NCCL_SOCKET_IFNAME should name a network that only the fleet reaches.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import msgspec

from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import ConfigError, FleetError, LinkError
from vllm_fleet.fabric.contract import Capabilities, KVPool
from vllm_fleet.fabric.endpoint import Endpoint
from vllm_fleet.fabric.owner import OwnedPool
from vllm_fleet.fabric.transports.cuda import driver, joining
from vllm_fleet.fabric.transports.cuda.nccl_link import NcclLink
from vllm_fleet.fabric.transports.cuda.nccl_tuning import Tuning
from vllm_fleet.wire.fabric import PoolHandle
from vllm_fleet.wire.names import DECODE_ERRORS

if TYPE_CHECKING:
    from vllm_fleet.fabric.transports.cuda.nccl_owner import NcclOwner


SETTLE_S = 3.0
"""close() waits so long for NCCL to let go of its sockets: a join that was given up goes on until the peer has come."""


class NcclTransport:
    """See the module's docstring. ``tuning`` (cuda/nccl_tuning.py) sets staging and NCCL's share of the GPU."""

    name = "nccl"
    capabilities = Capabilities(cpu=False, cuda=True, one_sided=False, same_host=False, sms=Tuning().multiprocessors)

    def __init__(self, endpoint: Endpoint, tuning: Tuning | None = None) -> None:
        self._endpoint = endpoint
        self._owned = OwnedPool(endpoint)
        self._links: list[NcclLink] = []
        self._lock = threading.Lock()
        self._tuning = tuning or Tuning()
        self._owner: NcclOwner | None = None
        """None where torch or nccl4py is missing: register() says so."""
        self._missing = _find_libraries()
        if self._missing is None:
            self._serve()

    def register(self, pool: KVPool) -> PoolHandle:
        if pool.cuda is None:
            raise LinkError("nccl moves CUDA memory only, and the pool is in CPU memory: use cma or tcp")
        if self._missing is not None:
            raise LinkError(self._missing)
        self.withdraw()
        details = _modules().nccl_copier.NcclDetails(
            self._endpoint.host, self._endpoint.port, driver.device_uuid(pool.cuda)
        )
        return PoolHandle(self.name, self._owned.register(pool), pool.sizes, msgspec.msgpack.encode(details))

    def withdraw(self) -> None:
        self._owned.withdraw()
        with self._lock:
            links, self._links = self._links, []
        for link in links:
            link.close()
        if self._owner is not None:
            self._owner.stop()

    def connect(self, peer: PoolHandle, deadline: Deadline) -> NcclLink:
        pool = self._owned.pool
        if pool is None or pool.cuda is None:
            raise LinkError("register a pool before connecting")
        nccl_copier = _modules().nccl_copier
        try:
            details = msgspec.msgpack.decode(peer.details, type=nccl_copier.NcclDetails)
        except DECODE_ERRORS as error:
            raise LinkError(f"the peer's nccl handle cannot be read: {error}") from error
        if details.gpu == driver.device_uuid(pool.cuda):
            raise LinkError("both workers use the same GPU, which NCCL does not connect to itself: use cuda_ipc")
        copier = nccl_copier.NcclCopier(details, peer, pool, self._endpoint.credentials, self._tuning)
        try:
            copier.open(lambda: None, deadline, deadline)
        except FleetError as error:
            raise LinkError(f"no nccl link to {details.host}:{details.port}: {error}") from error
        link = NcclLink(self.name, f"{details.host}:{details.port}", copier)
        with self._lock:
            self._links = [other for other in self._links if not other.is_closed()]
            self._links.append(link)
        return link

    def close(self) -> None:
        self.withdraw()
        joining.settle(Deadline.after(SETTLE_S, "fabric.transports.nccl.SETTLE_S"))

    def _serve(self) -> None:
        self._owner = _modules().nccl_owner.NcclOwner(self._endpoint, self._owned, self._tuning)


def _find_libraries() -> str | None:
    """Why nccl cannot be used here; None when it can."""
    try:
        joining.library()
        _modules()
    except (LinkError, ConfigError) as error:
        return str(error)
    return None


def _modules() -> Any:
    """The package cuda with what needs torch and Triton imported."""
    from vllm_fleet.fabric.transports import cuda
    from vllm_fleet.fabric.transports.cuda import nccl_copier, nccl_owner, pipe  # noqa: F401

    return cuda
