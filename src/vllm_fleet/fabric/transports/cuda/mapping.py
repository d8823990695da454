"""A pool's allocations as CUDA IPC handles, and their mapping in another process."""

from __future__ import annotations

import secrets
from typing import Annotated

import numpy as np
from msgspec import Meta, Struct

from vllm_fleet.core import limits
from vllm_fleet.core.errors import LinkError
from vllm_fleet.fabric.contract import KVPool
from vllm_fleet.fabric.transports.cuda import driver
from vllm_fleet.wire.names import Count

NONCE_BYTES = 32
ALLOCATIONS_MAX = 512
_NONCE_ALLOCATION_BYTES = 2 << 20  # CUDA's granularity: sharing it shares nobody else's memory

Handle = Annotated[bytes, Meta(min_length=driver.HANDLE_BYTES, max_length=driver.HANDLE_BYTES)]


class Place(Struct, frozen=True, array_like=True):
    """Where a region begins."""

    allocation: Count
    offset: Count


class Exported(Struct, frozen=True):
    """What another process needs to map a pool."""

    uuid: Annotated[bytes, Meta(min_length=driver.UUID_BYTES, max_length=driver.UUID_BYTES)]
    """The device's."""
    handles: Annotated[tuple[Handle, ...], Meta(max_length=ALLOCATIONS_MAX)]
    """One for each allocation."""
    places: Annotated[tuple[Place, ...], Meta(max_length=limits.REGIONS_MAX)]
    """One for each region."""
    nonce_handle: Handle
    """Of an allocation that begins with ..."""
    nonce: Annotated[bytes, Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
    """... these random bytes for as long as the registration stands."""


class Nonce:
    """Random bytes in device memory: a reader that still finds them after a copy knows that nothing was withdrawn."""

    def __init__(self, device: int) -> None:
        self.device = device
        self._address = driver.allocate(device, _NONCE_ALLOCATION_BYTES)
        self._stream = driver.Stream(device)
        self._host = driver.Pinned(device, NONCE_BYTES)
        self.handle = driver.export(device, self._address)

    def renew(self) -> bytes:
        """New random bytes, in device memory when this returns."""
        return self._write(secrets.token_bytes(NONCE_BYTES))

    def clear(self) -> None:
        """Make every check from now on fail."""
        self._write(bytes(NONCE_BYTES))

    def close(self, *, free: bool) -> None:
        """Give it back; ``free`` only if nobody maps it (freeing memory that others map is undefined in CUDA)."""
        self._stream.close()
        self._host.close()
        if free:
            driver.free(self.device, self._address)

    def _write(self, content: bytes) -> bytes:
        self._host.words[:] = np.frombuffer(content, np.int64)
        with driver.current(self.device):
            driver.copy_in(self._address, self._host.address, NONCE_BYTES, self._stream.cuda_stream)
        self._stream.synchronize()
        return content


def export_pool(pool: KVPool, device: int, nonce: Nonce) -> Exported:
    """Handles for all allocations that hold regions of a pool on ``device``, with a new nonce.

    Raises:
        LinkError: memory of another kind or device, not wholly inside one allocation, or not shareable.
    """
    bases: dict[int, int] = {}
    places = []
    for index, region in enumerate(pool.regions):
        found = driver.pointer_device(region.address)
        if found != device:
            raise LinkError(f"region {index} is on CUDA device {found}, but the pool says device {device}")
        base, nbytes = driver.allocation(device, region.address)
        if region.address + region.nbytes > base + nbytes:
            raise LinkError(f"region {index} spans several allocations; {driver.NOT_IPC}")
        places.append(Place(bases.setdefault(base, len(bases)), region.address - base))
    if len(bases) > ALLOCATIONS_MAX:
        raise LinkError(f"the pool lies in {len(bases)} allocations; cuda_ipc maps at most {ALLOCATIONS_MAX}")
    handles = tuple(driver.export(device, base) for base in bases)
    return Exported(driver.device_uuid(device), handles, tuple(places), nonce.handle, nonce.renew())


class Mapping:
    """A peer's pool, mapped for kernels on one device. ``regions``: their addresses here, int64 of shape [regions]."""

    def __init__(self, device: int, exported: Exported, region_bytes: tuple[int, ...]) -> None:
        """LinkError when it cannot be mapped, or the peer claims more than its allocations hold."""
        self._device = device
        self._opened: list[int] = []
        try:
            bases = [self._open(handle) for handle in exported.handles]
            self.nonce = self._open(exported.nonce_handle)
            self.regions = np.array(
                [
                    self._inside(bases, place, nbytes)
                    for place, nbytes in zip(exported.places, region_bytes, strict=True)
                ],
                np.int64,
            )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unmap; nothing may be running that uses it. Safe to call twice."""
        opened, self._opened = self._opened, []
        for address in opened:
            driver.close_handle(self._device, address)

    def _open(self, handle: bytes) -> int:
        address = driver.open_handle(self._device, handle)
        self._opened.append(address)
        return address

    def _inside(self, bases: list[int], place: Place, nbytes: int) -> int:
        """A region's address, checked against what the driver says is mapped: a peer's word is not enough."""
        if place.allocation >= len(bases):
            raise LinkError("the peer's cuda_ipc handle is inconsistent")
        base, mapped = driver.allocation(self._device, bases[place.allocation])
        start = bases[place.allocation] + place.offset
        if start + nbytes > base + mapped:
            raise LinkError(f"the peer claims {nbytes} bytes at {place.offset}, but only {mapped} are mapped")
        return start
