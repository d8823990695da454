"""The interfaces of the fabric: the connector thinks in one-sided reads of registered memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import PeerGone
from vllm_fleet.fabric.endpoint import Endpoint
from vllm_fleet.fabric.plan import BlockCopyPlan
from vllm_fleet.wire.fabric import PoolHandle


class TransferError(PeerGone):
    """A transfer failed; what it wrote must not be used. The message says why."""


class TransferCancelledError(TransferError):
    """A transfer was cancelled by its own side."""


@dataclass(frozen=True)
class Region:
    """``nbytes`` of this process's memory from ``address``: one layer's blocks, ``block_stride`` bytes apart.

    A block is ``block_bytes`` contiguous bytes; there are ``blocks`` of them.
    """

    address: int
    nbytes: int
    block_bytes: int
    block_stride: int
    blocks: int


@dataclass(frozen=True)
class KVPool:
    """The KV cache memory of one worker. ``owner`` keeps the memory alive for as long as the pool is."""

    regions: tuple[Region, ...]
    owner: object = field(default=None, repr=False, compare=False)

    def range(self, region: int, offset: int, nbytes: int) -> int:
        """The address of ``nbytes`` at ``offset`` of a region; IndexError when they are not all inside it."""
        if not 0 <= region < len(self.regions):
            raise IndexError(f"no region {region}: the pool has {len(self.regions)}")
        bound = self.regions[region]
        if offset < 0 or nbytes < 0 or offset + nbytes > bound.nbytes:
            raise IndexError(f"bytes {offset}..{offset + nbytes} are outside region {region} of {bound.nbytes} bytes")
        return bound.address + offset


class Transfer(Protocol):
    """One running copy. It ends in exactly one of done, failed(reason) or cancelled."""

    def done(self) -> bool:
        """Whether all bytes have arrived. Raises TransferError when it failed or was cancelled."""
        ...

    def wait(self, deadline: Deadline) -> None:
        """Block until done(); cancels and raises DeadlineExceeded when ``deadline`` comes first."""
        ...

    def cancel(self) -> None:
        """Stop; after this returns no byte is written by this transfer. Harmless when it has ended."""
        ...


class Link(Protocol):
    """One transport between one pair of workers. Transfers on one link end in the order they were started."""

    transport: str

    def read(self, plan: BlockCopyPlan) -> Transfer:
        """Start copying the peer's bytes into this side's pool; does not block. The destination must stay allocated
        until the transfer has ended."""
        ...

    def close(self) -> None:
        """Cancel what runs and give everything back. Safe to call twice."""
        ...


class Transport(Protocol):
    """One way to move bytes between workers. Safe to use from several threads."""

    name: str

    def register(self, pool: KVPool) -> PoolHandle:
        """Make a pool readable for peers that hold the handle; LinkError when this machine cannot."""
        ...

    def connect(self, peer: PoolHandle, deadline: Deadline) -> Link:
        """A link to a peer's pool, proved by a real read of a few bytes. LinkError says why it cannot be had."""
        ...

    def close(self) -> None:
        """Withdraw the registered pool and close every link."""
        ...


TransportFactory = Callable[[Endpoint], Transport]
"""Makes a transport; two-sided ones serve their sending half on the endpoint."""
