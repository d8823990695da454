"""The asking side of a cuda_ipc link: copies between this process's pool and a mapped one. Imports torch and triton."""

from __future__ import annotations

import select
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np

from vllm_fleet.core import limits, log
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import Corrupt, FleetError
from vllm_fleet.fabric.contract import KVPool, TransferError
from vllm_fleet.fabric.endpoint import receive_answer
from vllm_fleet.fabric.owner import encode_runs
from vllm_fleet.fabric.plan import BlockCopyPlan, Ints
from vllm_fleet.fabric.transports.cuda import driver
from vllm_fleet.fabric.transports.cuda.direct import DirectTransfer
from vllm_fleet.fabric.transports.cuda.kernels import CopyQueue, ReadQueue
from vllm_fleet.fabric.transports.cuda.mapping import NONCE_BYTES, Mapping
from vllm_fleet.fabric.transports.cuda.reads import DirectReads, check_nonce, check_plan
from vllm_fleet.fabric.transports.cuda.watch import Hangups, hung_up
from vllm_fleet.net.channel import Channel
from vllm_fleet.wire import fabric as wire
from vllm_fleet.wire.fabric import PoolHandle

FIRST_BYTES = 32 << 20  # a small first piece: the GPU is at work while the rest of the plan is prepared
FIRST_RUNS = 1024
GROWTH = 4  # of each piece over the one before: copying one takes longer than preparing the next, 30 ns for each run
PIECE_BYTES_MAX = 512 << 20  # two pieces are under way, 3 ms over NVLink: the longest a cancel waits
UNDER_WAY = 2
PERMIT_S = 10.0
PERMIT_SETTING = "fabric.transports.cuda.reader.PERMIT_S"
LOOK_MS = 20  # between looks at the cancel event while the owner is asked

Start: TypeAlias = Callable[[BlockCopyPlan], Callable[[], None]]
"""Starts a part of a plan; what it returns waits for that part."""


def warm_up(device: int) -> None:
    """Compile the copy kernels, or load them from Triton's cache: seconds that no deadline of connect() should pay."""
    words = driver.Pinned(device, 2 * NONCE_BYTES)
    stream = driver.Stream(device)
    queue = CopyQueue(device, stream.cuda_stream)
    at = np.array([words.address], np.int64)
    queue.start(at, at + NONCE_BYTES, np.array([NONCE_BYTES], np.int64))()
    reads = ReadQueue(device, stream.cuda_stream, words.address)
    stream.synchronize()
    for one in (reads, queue, stream, words):
        one.close()


class IpcCopier:
    """Carries out plans on a stream of its own; unmaps when the owner hangs up, even if nothing is asked of it."""

    def __init__(
        self, pool: KVPool, peer: PoolHandle, mapping: Mapping, nonce: bytes, channel: Channel, hangups: Hangups
    ) -> None:
        assert pool.cuda is not None
        self._device = pool.cuda
        self._own = np.array([region.address for region in pool.regions], np.int64)
        self._own_bytes = np.array(pool.sizes, np.int64)
        self._peer = peer
        self._peer_bytes = np.array(peer.region_bytes, np.int64)
        self._mapping = mapping
        self._nonce = nonce
        self._channel = channel
        self._unanswered = 0
        self._lock = threading.Lock()  # held while the mapping is in use
        self._gone = threading.Event()
        self._stream = driver.Stream(self._device)
        self._queue = CopyQueue(self._device, self._stream.cuda_stream)
        self._pinned = driver.Pinned(self._device, NONCE_BYTES)
        self._reads = DirectReads(pool, peer, mapping, nonce, self._stream, channel.peer)
        self._hangups = hangups
        hangups.watch(channel.socket, self._hung_up)

    def probe(self) -> None:
        """Read the nonce as blocks are read, by the kernel, and as it is checked. TransferError when it is another."""
        with self._lock:
            self._check_owner()
            self._reads.probe()
            self._fetch_nonce()
            self._stream.synchronize()
            self._check_nonce()

    def read(self, plan: BlockCopyPlan, cancelled: threading.Event) -> None:
        with self._lock:
            self._reads.forget(plan)
        self._copy(plan, (self._peer_bytes, self._own_bytes), cancelled, self._start_read)

    def prepare(self, plan: BlockCopyPlan) -> None:
        """Fill and upload the table for start_read(plan), unless that has to wait for something. Raises nothing."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            if not self._gone.is_set():
                self._reads.prepare(plan)
        finally:
            self._lock.release()

    def start_read(self, plan: BlockCopyPlan) -> DirectTransfer | None:
        """Start a read on the calling thread; None when it should be left to the link's thread.

        That is when the thread is at work, the plan is long or empty, or much is under way already. Two changes of
        threads cost 0.2 ms, twice the time of a copy of 32 MiB.
        """
        if not self._lock.acquire(blocking=False):
            return None
        try:
            transfer = None if self._gone.is_set() else self._reads.start(plan)
            if transfer is not None:
                try:
                    self._check_owner()  # while the GPU is at work; the mapping stays for as long as the lock is held
                except FleetError as error:
                    self._stream.synchronize()
                    transfer.fail(error)
            return transfer
        finally:
            self._lock.release()

    def cancel_direct(self) -> None:
        """Cancel what start_read() started."""
        self._reads.cancel()

    def _check_owner(self) -> None:
        """TransferError when the owner has hung up; the lock is held."""
        if self._gone.is_set() or hung_up(self._channel.socket):
            raise self._left()

    def _start_read(self, part: BlockCopyPlan) -> Callable[[], None]:
        source, target = self._mapping.regions[part.region], self._own[part.region]
        source += part.source
        target += part.target
        return self._queue.start(source, target, part.nbytes)

    def write(self, plan: BlockCopyPlan, cancelled: threading.Event) -> None:
        sizes = (self._own_bytes, self._peer_bytes)

        def start(part: BlockCopyPlan) -> Callable[[], None]:
            if not self._permitted(part, cancelled):
                return lambda: None
            source = self._own[part.region] + part.source
            target = self._mapping.regions[part.region] + part.target
            return self._queue.start(source, target, part.nbytes)

        self._copy(plan, sizes, cancelled, start)

    def interrupt(self) -> None:
        """Nothing to wake: what is under way ends within milliseconds, and questions look at the event."""

    def close(self) -> None:
        self._hangups.forget(self._channel.socket)
        self._unmap()
        with self._lock:
            self._queue.close()
            self._reads.close()
            self._stream.close()
            self._pinned.close()

    def _hung_up(self) -> None:
        """The owner closed the connection or died; called on the watching thread."""
        try:
            self._unmap()
            log.event("link.lost", peer=self._channel.peer, reason=str(self._left()))
        except FleetError as error:
            log.event("link.lost", peer=self._channel.peer, reason=str(error))

    def _unmap(self) -> None:
        self._gone.set()
        with self._lock:
            try:
                self._stream.synchronize()
                self._mapping.close()
            finally:
                self._channel.close()  # tells the owner that its memory is free to go

    def _copy(self, plan: BlockCopyPlan, sizes: tuple[Ints, Ints], cancelled: threading.Event, start: Start) -> None:
        """Start the plan's parts one after the other, two ahead; returns or raises with nothing under way."""
        under_way: deque[Callable[[], None]] = deque()
        with self._lock:
            self._check_owner()
            try:
                for part in _parts(plan, sizes):
                    if cancelled.is_set() or self._gone.is_set():
                        break
                    under_way.append(start(part))
                    if len(under_way) > UNDER_WAY:
                        under_way.popleft()()
                if self._gone.is_set():
                    raise self._left()
                self._fetch_nonce()
            finally:
                self._stream.synchronize()  # nothing of ours is written once this has returned
            if not cancelled.is_set():
                self._check_nonce()

    def _fetch_nonce(self) -> None:
        """Fetch the owner's nonce behind all copies so far; there when the stream has ended."""
        self._pinned.words[:] = 0
        with driver.current(self._device):
            driver.copy_out(self._pinned.address, self._mapping.nonce, NONCE_BYTES, self._stream.cuda_stream)

    def _check_nonce(self) -> None:
        check_nonce(self._pinned.words.tobytes(), self._nonce, self._channel.peer)

    def _left(self) -> TransferError:
        return TransferError(f"{self._channel.peer} has withdrawn its memory or is gone: it closed the connection")

    def _permitted(self, part: BlockCopyPlan, cancelled: threading.Event) -> bool:
        """Ask the owner whether these runs may be written; False when the transfer was cancelled meanwhile."""
        deadline = Deadline.after(PERMIT_S, PERMIT_SETTING)
        runs = encode_runs(part.region, part.target, part.nbytes)
        self._channel.send(wire.encode(wire.Permit(part.grant, self._peer.pool, runs)), deadline)
        self._unanswered += 1
        poller = select.poll()
        poller.register(self._channel.socket, select.POLLIN)
        while True:
            if cancelled.is_set():
                return False  # the answer is thrown away before the next one
            if not poller.poll(LOOK_MS):
                deadline.check(self._channel.peer, "answering whether its memory may be written")
                continue
            try:
                answer = receive_answer(self._channel, deadline)
            except FleetError as error:
                raise TransferError(f"{self._channel.peer} is gone: {error}") from error
            self._unanswered -= 1
            if self._unanswered == 0:
                break
        if isinstance(answer, wire.Denied):
            raise TransferError(f"{self._channel.peer} refused the write: {answer.reason} {answer.detail}".rstrip())
        if answer != wire.Permitted(part.total_bytes):
            raise Corrupt(f"{self._channel.peer} answered something else than that the bytes may be written")
        return True


def _parts(plan: BlockCopyPlan, sizes: tuple[Ints, Ints]) -> Iterator[BlockCopyPlan]:
    """The plan in pieces, from FIRST_BYTES growing to PIECE_BYTES_MAX; made when asked for. All is checked first."""
    if not len(plan):
        return
    check_plan(plan, *sizes)
    plan = plan.split(FIRST_BYTES)
    ends = np.cumsum(plan.nbytes)
    start, runs_max, bytes_max = 0, FIRST_RUNS, FIRST_BYTES
    while start < len(plan):
        done = int(ends[start - 1]) if start else 0
        stop = int(np.searchsorted(ends, done + bytes_max, side="right"))
        stop = min(max(stop, start + 1), start + runs_max)
        yield _slice(plan, slice(start, stop))
        start = stop
        runs_max, bytes_max = min(runs_max * GROWTH, limits.RUNS_MAX), min(bytes_max * GROWTH, PIECE_BYTES_MAX)


def _slice(plan: BlockCopyPlan, piece: slice) -> BlockCopyPlan:
    return BlockCopyPlan(plan.grant, plan.region[piece], plan.source[piece], plan.target[piece], plan.nbytes[piece])
