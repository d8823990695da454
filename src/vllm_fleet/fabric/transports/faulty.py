"""Faulty: any transport with faults by a script, for tests of what stands on top of it.

    script = Script(transfers=(Rule(Cut(after_bytes=4096), nth=0), Rule(Corrupt(offset=10), probability=0.01)), seed=7)
    transport = faulty(load("tcp"), script)(endpoint)

What each fault means is in fabric/faults.py.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import numpy as np

from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import BadRequest, LinkError
from vllm_fleet.fabric.contract import KVPool, Link, Transfer, TransferError, Transport, TransportFactory
from vllm_fleet.fabric.endpoint import Endpoint
from vllm_fleet.fabric.faults import ConnectFault, Corrupt, Cut, Delay, Refuse, Reorder, Script, TransferFault, Truncate
from vllm_fleet.fabric.plan import BlockCopyPlan, Ints
from vllm_fleet.fabric.work import WorkLink, WorkTransfer
from vllm_fleet.wire.fabric import PoolHandle

PIECES = 8  # a reordered transfer is moved in about so many pieces
PIECE_BYTES_MIN = 4096  # ... none smaller than this, but for the ends of runs
PIECE_S = 300.0  # beyond the inner transport's own bounds, which come first
PIECE_SETTING = "fabric.transports.faulty.PIECE_S"

Flip: TypeAlias = Callable[[KVPool, int, int, int], None]
"""Changes one byte of a pool: (pool, region, offset in bytes, what to exclusive-or it with)."""


def flip_cpu(pool: KVPool, region: int, offset: int, xor: int) -> None:
    """Change one byte of a pool in CPU memory; BadRequest for CUDA memory."""
    if pool.cuda is not None:
        raise BadRequest("Corrupt on CUDA memory needs faulty(..., flip=) that changes a byte there")
    at = ctypes.c_uint8.from_address(pool.range(region, offset, 1))
    at.value ^= xor


def faulty(inner: TransportFactory, script: Script, flip: Flip = flip_cpu) -> TransportFactory:
    """A factory of ``inner`` transports with the script's faults; ``flip`` carries out Corrupt in this side's pool."""
    return functools.partial(FaultyTransport, inner, script, flip)


class FaultyTransport:
    """See the module's docstring. Handles, name and capabilities are the inner transport's."""

    def __init__(self, inner: TransportFactory, script: Script, flip: Flip, endpoint: Endpoint) -> None:
        self._inner: Transport = inner(endpoint)
        self._script = script
        self._flip = flip
        self.name = self._inner.name
        self.capabilities = self._inner.capabilities
        self._pool: KVPool | None = None
        self._links: list[WorkLink] = []
        self._lock = threading.Lock()
        self._connects = 0
        self._transfers = 0

    def register(self, pool: KVPool) -> PoolHandle:
        self._close_links()
        handle = self._inner.register(pool)
        self._pool = pool
        return handle

    def withdraw(self) -> None:
        self._close_links()
        self._pool = None
        self._inner.withdraw()

    def connect(self, peer: PoolHandle, deadline: Deadline) -> Link:
        with self._lock:
            number, self._connects = self._connects, self._connects + 1
        for fault in self._script.faults("connect", number):
            if isinstance(fault, Refuse):
                raise LinkError(fault.reason)
            if isinstance(fault, Delay):
                threading.Event().wait(min(fault.seconds, deadline.remaining()))
        inner = self._inner.connect(peer, deadline)
        pool = self._pool
        if pool is None:
            inner.close()
            raise LinkError("register a pool before connecting")
        link = _FaultyLink(self.name, str(number), _Copier(inner, pool, self._flip), self._next_faults)
        with self._lock:
            self._links.append(link)
        return link

    def close(self) -> None:
        self.withdraw()
        self._inner.close()

    def _next_faults(self) -> list[TransferFault | ConnectFault]:
        with self._lock:
            number, self._transfers = self._transfers, self._transfers + 1
        return self._script.faults("transfer", number)

    def _close_links(self) -> None:
        with self._lock:
            links, self._links = self._links, []
        for link in links:
            link.close()


class _FaultyLink(WorkLink):
    """Draws each transfer's faults when it is started: their order is that of the calls."""

    def __init__(
        self, transport: str, peer: str, copier: _Copier, draw: Callable[[], list[TransferFault | ConnectFault]]
    ) -> None:
        self._faulty = copier
        self._draw = draw
        super().__init__(transport, f"faulty-{peer}", copier)

    def read(self, plan: BlockCopyPlan) -> WorkTransfer:
        return self._start(functools.partial(self._faulty.carry, self._draw(), False), plan)

    def write(self, plan: BlockCopyPlan) -> WorkTransfer:
        return self._start(functools.partial(self._faulty.carry, self._draw(), True), plan)


class _Copier:
    """Carries out plans through the inner link, with faults."""

    def __init__(self, link: Link, pool: KVPool, flip: Flip) -> None:
        self._link = link
        self._pool = pool
        self._flip = flip
        self._lock = threading.Lock()
        self._current: Transfer | None = None

    def read(self, plan: BlockCopyPlan, cancelled: threading.Event) -> None:
        self.carry([], False, plan, cancelled)

    def write(self, plan: BlockCopyPlan, cancelled: threading.Event) -> None:
        self.carry([], True, plan, cancelled)

    def carry(
        self,
        faults: Sequence[TransferFault | ConnectFault],
        write: bool,
        plan: BlockCopyPlan,
        cancelled: threading.Event,
    ) -> None:
        """Move a plan's bytes as far as the faults let them; raises what the contract says for each."""
        whole, cut = plan, None
        corrupt: list[Corrupt] = []
        for fault in faults:
            if isinstance(fault, Delay):
                cancelled.wait(fault.seconds)
            elif isinstance(fault, Cut) and plan.total_bytes > fault.after_bytes:
                cut = fault.after_bytes
                plan = _first(plan, fault.after_bytes)
            elif isinstance(fault, Truncate):
                plan = _first(plan, max(0, plan.total_bytes - fault.nbytes))
            elif isinstance(fault, Corrupt) and whole.total_bytes:
                corrupt.append(fault)
        pieces = next((_shuffled(plan, f.seed) for f in faults if isinstance(f, Reorder)), [plan])
        with self._sent_wrong(whole, corrupt if write else []):
            for piece in pieces:
                if not self._move(piece, write, cancelled):
                    return
        if cut is not None:
            raise TransferError(f"cut by the script after {cut} bytes")
        for fault in () if write else corrupt:
            self._flip(self._pool, *_byte(whole.region, whole.target, whole.nbytes, fault.offset), fault.xor)

    @contextmanager
    def _sent_wrong(self, plan: BlockCopyPlan, corrupt: Sequence[Corrupt]) -> Iterator[None]:
        places = [(*_byte(plan.region, plan.source, plan.nbytes, fault.offset), fault.xor) for fault in corrupt]
        for place in places:
            self._flip(self._pool, *place)
        try:
            yield
        finally:
            for place in places:
                self._flip(self._pool, *place)

    def _move(self, plan: BlockCopyPlan, write: bool, cancelled: threading.Event) -> bool:
        """Move one piece; False when the transfer was cancelled before it began."""
        with self._lock:
            if cancelled.is_set():
                return False
            transfer = self._link.write(plan) if write else self._link.read(plan)
            self._current = transfer
        try:
            transfer.wait(Deadline.after(PIECE_S, PIECE_SETTING))
        finally:
            self._current = None
        return True

    def interrupt(self) -> None:
        with self._lock:
            transfer = self._current
        if transfer is not None:
            transfer.cancel()

    def close(self) -> None:
        self._link.close()


def _first(plan: BlockCopyPlan, nbytes: int) -> BlockCopyPlan:
    """The plan's first ``nbytes`` bytes."""
    ends = np.cumsum(plan.nbytes)
    kept = np.minimum(plan.nbytes, np.maximum(0, nbytes - (ends - plan.nbytes)))
    count = int(np.count_nonzero(kept))
    return BlockCopyPlan(plan.grant, plan.region[:count], plan.source[:count], plan.target[:count], kept[:count])


def _shuffled(plan: BlockCopyPlan, seed: int) -> list[BlockCopyPlan]:
    """The plan's runs in a random order, cut into pieces."""
    if not len(plan):
        return [plan]
    each = -(-plan.total_bytes // (PIECES * PIECE_BYTES_MIN)) * PIECE_BYTES_MIN
    plan = plan.split(max(PIECE_BYTES_MIN, each))
    order = np.random.default_rng(seed).permutation(len(plan))
    return [
        BlockCopyPlan(plan.grant, plan.region[part], plan.source[part], plan.target[part], plan.nbytes[part])
        for part in np.array_split(order, min(PIECES, len(plan)))
    ]


def _byte(region: Ints, start: Ints, nbytes: Ints, offset: int) -> tuple[int, int]:
    """Region and offset of byte ``offset`` of a plan, counted modulo all its bytes."""
    ends = np.cumsum(nbytes)
    offset %= int(ends[-1])
    run = int(np.searchsorted(ends, offset, side="right"))
    return int(region[run]), int(start[run] + offset - (ends[run] - nbytes[run]))
