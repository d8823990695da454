"""Memory: moves bytes between pools registered in one process, for users' tests and ours.

The owners of this process stand in one table, by the id of their registration. What other transports promise holds here
too: grants are asked for each piece, a withdrawn or replaced registration fails, and withdraw() returns only when no
copy touches its memory any more.
"""

from __future__ import annotations

import ctypes
import secrets
import threading
from dataclasses import dataclass, field
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta, Struct

from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import LinkError
from vllm_fleet.fabric.contract import Capabilities, KVPool, TransferError
from vllm_fleet.fabric.endpoint import Endpoint
from vllm_fleet.fabric.owner import OwnedPool, encode_runs
from vllm_fleet.fabric.plan import BlockCopyPlan, Ints
from vllm_fleet.fabric.work import WorkLink, check_bounds
from vllm_fleet.wire import fabric as wire
from vllm_fleet.wire.fabric import PoolHandle
from vllm_fleet.wire.names import DECODE_ERRORS

PIECE_RUNS_MAX = 1024  # the longest that a cancel or a withdraw waits: one piece
PIECE_BYTES_MAX = 4 << 20
PROCESS_BYTES = 16


class MemoryDetails(Struct, frozen=True):
    """The memory part of a PoolHandle."""

    process: Annotated[bytes, Meta(min_length=PROCESS_BYTES, max_length=PROCESS_BYTES)]
    """Random for each process: tells a handle from elsewhere."""


_PROCESS = secrets.token_bytes(PROCESS_BYTES)
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(MemoryDetails).decode


@dataclass(eq=False)
class _Registration:
    """One pool that peers in this process may reach."""

    owned: OwnedPool
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while bytes move: whoever has taken it after the end of the registration knows that nothing moves."""


_registrations: dict[str, _Registration] = {}
_registrations_lock = threading.Lock()


class MemoryTransport:
    """See the module's docstring."""

    name = "memory"
    capabilities = Capabilities(cpu=True, cuda=False, one_sided=True, same_host=True)

    def __init__(self, endpoint: Endpoint) -> None:
        self._owned = OwnedPool(endpoint)
        self._id = ""
        self._links: list[WorkLink] = []
        self._lock = threading.Lock()

    def register(self, pool: KVPool) -> PoolHandle:
        if pool.cuda is not None:
            raise LinkError("memory moves CPU memory only, and the pool is in CUDA memory; use cuda_ipc")
        self.withdraw()
        self._id = self._owned.register(pool)
        with _registrations_lock:
            _registrations[self._id] = _Registration(self._owned)
        return PoolHandle(self.name, self._id, pool.sizes, _encode(MemoryDetails(_PROCESS)))

    def withdraw(self) -> None:
        self._owned.withdraw()
        with _registrations_lock:
            registration = _registrations.pop(self._id, None)
        if registration is not None:
            with registration.lock:
                pass  # the piece under way has ended; the next one finds the registration gone
        with self._lock:
            links, self._links = self._links, []
        for link in links:
            link.close()

    def connect(self, peer: PoolHandle, deadline: Deadline) -> WorkLink:
        deadline.check("memory", "connecting")
        pool = self._owned.pool
        if pool is None:
            raise LinkError("register a pool before connecting")
        try:
            details = _decode(peer.details)
        except DECODE_ERRORS as error:
            raise LinkError(f"the peer's memory handle cannot be read: {error}") from error
        if details.process != _PROCESS:
            raise LinkError("the peer is in another process; memory reaches pools of its own process only")
        with _registrations_lock:
            registration = _registrations.get(peer.pool)
        theirs = None if registration is None else registration.owned.pool
        if registration is None or theirs is None:
            raise LinkError("the peer has withdrawn that memory or is gone")
        if theirs.sizes != peer.region_bytes:
            raise LinkError("the peer's memory handle is inconsistent")
        link = WorkLink(self.name, peer.pool[:8], _Copier(registration, peer, pool))
        with self._lock:
            self._links.append(link)
        return link

    def close(self) -> None:
        self.withdraw()


class _Copier:
    """Carries out plans between one peer's pool and ours."""

    def __init__(self, registration: _Registration, peer: PoolHandle, pool: KVPool) -> None:
        self._registration = registration
        self._peer = peer
        self._own = np.array([region.address for region in pool.regions], np.int64)
        self._own_bytes = np.array(pool.sizes, np.int64)
        self._peer_bytes = np.array(peer.region_bytes, np.int64)

    def read(self, plan: BlockCopyPlan, cancelled: threading.Event) -> None:
        if len(plan):
            check_bounds(plan, self._peer_bytes, self._own_bytes)
            self._copy(plan, cancelled, write=False)

    def write(self, plan: BlockCopyPlan, cancelled: threading.Event) -> None:
        if len(plan):
            check_bounds(plan, self._own_bytes, self._peer_bytes)
            self._copy(plan, cancelled, write=True)

    def interrupt(self) -> None:
        """Nothing to wake: a piece takes a millisecond."""

    def close(self) -> None:
        """Nothing is kept."""

    def _copy(self, plan: BlockCopyPlan, cancelled: threading.Event, *, write: bool) -> None:
        plan = plan.split(PIECE_BYTES_MAX)
        own_offset, their_offset = (plan.source, plan.target) if write else (plan.target, plan.source)
        own = self._own[plan.region] + own_offset
        for piece in plan.pieces(PIECE_RUNS_MAX, PIECE_BYTES_MAX):
            if cancelled.is_set():
                return
            with self._registration.lock:
                theirs = self._check(plan, piece, their_offset, write)
                source, target = (own[piece], theirs) if write else (theirs, own[piece])
                _move(source, target, plan.nbytes[piece])
        if not self._registration.owned.is_current(self._peer.pool):
            raise TransferError("the peer refused the transfer: stale_pool")

    def _check(self, plan: BlockCopyPlan, piece: slice, offset: Ints, write: bool) -> Ints:
        """The addresses of a piece's runs in the peer's pool; TransferError when the peer does not allow it."""
        encoded = encode_runs(plan.region[piece], offset[piece], plan.nbytes[piece])
        runs = self._registration.owned.check(self._peer.pool, plan.grant, encoded, write=write)
        if isinstance(runs, wire.Denied):
            raise TransferError(f"the peer refused the transfer: {runs.reason}")
        return runs.addresses


def _move(source: Ints, target: Ints, nbytes: Ints) -> None:
    """Copy runs inside this process: arrays of addresses and lengths, of shape [runs]."""
    for start, to, length in zip(source.tolist(), target.tolist(), nbytes.tolist(), strict=True):
        ctypes.memmove(to, start, length)
