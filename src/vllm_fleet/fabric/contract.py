"""The interfaces of the fabric: the connector thinks in one-sided reads and writes of registered memory."""

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
class Capabilities:
    """What a transport can do; the link selection and the tests read it, nobody asks for its class."""

    cpu: bool
    """Moves blocks in CPU memory."""
    cuda: bool
    """Moves blocks in CUDA memory."""
    one_sided: bool
    """A read needs no help from the owner's process while it runs: the owner may be stopped."""
    same_host: bool
    """Reaches peers on this host only."""
    sms: int = 0
    """Streaming multiprocessors of a GPU that one transfer occupies at most."""


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
    cuda: int | None = None
    """The CUDA device (this process's number for it) that holds all regions; None: CPU memory."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each region."""
        return tuple(region.nbytes for region in self.regions)

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
    """One transport between one pair of workers. Transfers on one link are carried out in the order of their start."""

    transport: str

    def prepare(self, plan: BlockCopyPlan) -> None:
        """Work out beforehand what ``read(plan)`` of this very object needs, where that makes the read start sooner.

        A hint, for plans that are known before the peer's bytes are: it starts no copy, does not block and raises
        nothing. What it did is kept until that read, or until a few other plans have been prepared; most transports
        do nothing.
        """
        ...

    def read(self, plan: BlockCopyPlan) -> Transfer:
        """Start copying the peer's bytes (``plan.source``) into this side's pool (``plan.target``); does not block.

        The target must stay allocated until the transfer has ended.
        """
        ...

    def write(self, plan: BlockCopyPlan) -> Transfer:
        """Start copying this side's bytes (``plan.source``) into the peer's pool (``plan.target``); does not block.

        done() means that the bytes are in the peer's memory. After a failure or cancel() this side reads no more of
        its pool; what the peer's target holds is undefined, and bytes under way may still land there until the peer
        has withdrawn the grant.
        """
        ...

    def close(self) -> None:
        """Cancel what runs and give everything back. Safe to call twice."""
        ...


class Transport(Protocol):
    """One way to move bytes between workers. Safe to use from several threads."""

    name: str
    capabilities: Capabilities

    def register(self, pool: KVPool) -> PoolHandle:
        """Make a pool reachable for peers that hold the handle; LinkError when this transport cannot.

        Takes the place of what was registered before: transfers with an older handle fail from now on.
        """
        ...

    def withdraw(self) -> None:
        """Take the registration back, before its memory is freed: transfers with its handle fail from now on.

        Links of this side that use the pool as their own are closed. Safe to call twice.
        """
        ...

    def connect(self, peer: PoolHandle, deadline: Deadline) -> Link:
        """A link to a peer's pool, proved by a real read of a few bytes. LinkError says why it cannot be had."""
        ...

    def close(self) -> None:
        """Withdraw the registered pool and close every link. Safe to call twice."""
        ...


TransportFactory = Callable[[Endpoint], Transport]
"""Makes a transport; two-sided ones serve their half on the endpoint."""
