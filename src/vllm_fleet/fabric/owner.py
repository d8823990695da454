"""The owner's half of two-sided transports: the registered pool, and the checks each question about it must pass."""

from __future__ import annotations

import secrets
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vllm_fleet.core.errors import Corrupt
from vllm_fleet.fabric.plan import Ints
from vllm_fleet.wire import fabric as wire

if TYPE_CHECKING:
    from vllm_fleet.fabric.contract import KVPool
    from vllm_fleet.fabric.endpoint import Endpoint


@dataclass(frozen=True)
class Runs:
    """Checked runs of the registered pool; arrays of shape [runs], dtype int64."""

    pool: KVPool
    region: Ints
    offset: Ints
    nbytes: Ints

    @property
    def total_bytes(self) -> int:
        """Bytes of all runs."""
        return int(self.nbytes.sum())

    @property
    def addresses(self) -> Ints:
        """Address of each run in this process (for CUDA memory: in its CUDA context)."""
        base = np.array([region.address for region in self.pool.regions], np.int64)
        return base[self.region] + self.offset


class OwnedPool:
    """One transport's registration: one pool at a time. Safe to use from several threads."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._lock = threading.Lock()
        self._id = ""

    def register(self, pool: KVPool) -> str:
        """Serve this pool from now on, in place of the one before; the id of the registration."""
        with self._lock:
            self._endpoint.registrations.pop(self._id, None)
            self._id = secrets.token_hex(16)
            self._endpoint.registrations[self._id] = pool
            return self._id

    def withdraw(self) -> None:
        """Serve nothing from now on."""
        with self._lock:
            self._endpoint.registrations.pop(self._id, None)
            self._id = ""

    @property
    def pool(self) -> KVPool | None:
        """What is registered now."""
        with self._lock:
            return self._endpoint.registrations.get(self._id)

    def is_current(self, pool_id: str) -> bool:
        """Whether this registration still stands: checked before and after memory is used."""
        with self._lock:
            return bool(self._id) and self._id == pool_id

    def check(self, pool_id: str, grant: str, encoded: bytes, *, write: bool = False) -> Runs | wire.Denied:
        """As check_runs(), for this transport's own registration only."""
        if not self.is_current(pool_id):
            return wire.Denied("stale_pool")
        return check_runs(self._endpoint, pool_id, grant, encoded, write=write)


def check_runs(
    endpoint: Endpoint, pool_id: str, grant: str, encoded: bytes, *, write: bool = False
) -> Runs | wire.Denied:
    """The runs a peer names, if the registration stands, they are inside its regions and the grant covers them.

    Raises:
        Corrupt: ``encoded`` is no whole number of runs.
    """
    if len(encoded) % wire.RUN_BYTES:
        raise Corrupt(f"{len(encoded)} bytes are no whole number of runs")
    runs = np.frombuffer(encoded, "<i8").reshape(-1, 3)
    region, offset, nbytes = runs[:, 0], runs[:, 1], runs[:, 2]
    pool = endpoint.registrations.get(pool_id)
    if pool is None:
        return wire.Denied("stale_pool")
    sizes = np.array(pool.sizes, np.int64)
    inside = (region >= 0) & (region < len(sizes)) & (offset >= 0) & (nbytes > 0)
    if not bool(inside.all()) or not bool((nbytes <= sizes[region] - offset).all()):
        return wire.Denied("out_of_range")
    allowed = endpoint.allow_write if write else endpoint.allow_read
    if not allowed(grant, region, offset, nbytes):
        return wire.Denied("not_granted")
    return Runs(pool, region, offset, nbytes)


def encode_runs(region: Ints, offset: Ints, nbytes: Ints) -> bytes:
    """Runs as a question carries them: little-endian int64 triples of region, offset and length in bytes."""
    return np.ascontiguousarray(np.stack([region, offset, nbytes], axis=1), "<i8").tobytes()
