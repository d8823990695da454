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
from vllm_fleet.fabric.transports.cuda.direct import DirectTransfer, Slot
from vllm_fleet.fabric.transports.cuda.kernels import CopyQueue
from vllm_fleet.fabric.transports.cuda.mapping import NONCE_BYTES, Mapping
from vllm_fleet.fabric.transports.cuda.watch import Hangups, hung_up
from vllm_fleet.fabric.work import check_bounds
from vllm_fleet.net.channel import Channel
from vllm_fleet.wire import fabric as wire
from vllm_fleet.wire.fabric import PoolHandle

FIRST_BYTES = 8 << 20  # a small first piece: the GPU is at work while the rest of the plan is prepared
FIRST_RUNS = 1024
GROWTH = 2  # of each piece over the one before: copying one takes longer than preparing the next, 30 ns for each run
PIECE_BYTES_MAX = 512 << 20  # two pieces are under way, 3 ms over NVLink: the longest a cancel waits
UNDER_WAY = 2
PERMIT_S = 10.0
PERMIT_SETTING = "fabric.transports.cuda.reader.PERMIT_S"
SLOTS = 4  # transfers that callers' own threads may have under way
DIRECT_BYTES_MAX = 1 << 30
LOOK_MS = 20  # between looks at the cancel event while the owner is asked

Start: TypeAlias = Callable[[BlockCopyPlan], Callable[[], None]]
"""Starts a part of a plan; what it returns waits for that part."""


def warm_up(device: int) -> None:
    """Compile the copy kernel, or load it from Triton's cache: seconds that no deadline of connect() should pay."""
    words = driver.Pinned(device, 2 * NONCE_BYTES)
    stream = driver.Stream(device)
    queue = CopyQueue(device, stream.cuda_stream)
    at = np.array([words.address], np.int64)
    queue.start(at, at + NONCE_BYTES, np.array([NONCE_BYTES], np.int64))()
    queue.close()
    stream.close()
    words.close()


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
        self._pinned = driver.Pinned(self._device, NONCE_BYTES * (1 + SLOTS))
        self._seen = Slot(self._device, self._pinned, 0)
        self._slots = [Slot(self._device, self._pinned, index + 1) for index in range(SLOTS)]
        self._hangups = hangups
        hangups.watch(channel.socket, self._hung_up)

    def probe(self) -> None:
        """Read the nonce as blocks are read, by the kernel, and as it is checked. TransferError when it is another."""
        with self._lock:
            self._check_owner()
            source, target = np.array([self._mapping.nonce]), np.array([self._seen.address])
            self._queue.start(source, target, np.array([NONCE_BYTES], np.int64))()
            self.check(self._seen)
            self._fetch_nonce(self._seen)
            self._stream.synchronize()
            self.check(self._seen)

    def read(self, plan: BlockCopyPlan, cancelled: threading.Event) -> None:
        self._copy(plan, (self._peer_bytes, self._own_bytes), cancelled, self._start_read)

    def start_read(self, plan: BlockCopyPlan) -> DirectTransfer | None:
        """Start a read on the calling thread; None when it should be left to the link's thread.

        That is when the thread is at work, the plan is long, or as many direct transfers as there are slots are under
        way. Two changes of threads cost 0.2 ms, twice the time of a copy of 32 MiB.
        """
        if len(plan) > limits.RUNS_MAX or not self._lock.acquire(blocking=False):
            return None
        try:
            slot = next((slot for slot in self._slots if slot.user is None or slot.user.has_ended()), None)
            nbytes = plan.total_bytes
            if slot is None or nbytes > DIRECT_BYTES_MAX:
                return None
            slot.user = transfer = DirectTransfer(self, slot, nbytes)
            try:
                self._check_owner()
                for part in _parts(plan, (self._peer_bytes, self._own_bytes)):
                    self._start_read(part)
                self._fetch_nonce(slot)
            except FleetError as error:
                self._stream.synchronize()
                transfer.fail(error)
            return transfer
        finally:
            self._lock.release()

    def cancel_direct(self) -> None:
        """Cancel what start_read() started."""
        for slot in self._slots:
            if slot.user is not None:
                slot.user.cancel()

    def check(self, slot: Slot) -> None:
        """TransferError unless the registration stood until the nonce was fetched to the slot.

        Whether the owner still lives does not matter: what was read is right, for memory outlives its owner while it
        is mapped.
        """
        if slot.words.tobytes() != self._nonce:
            raise TransferError(f"{self._channel.peer} does not hold what it registered: withdrawn or replaced")

    def _check_owner(self) -> None:
        """TransferError when the owner has hung up; the lock is held."""
        if self._gone.is_set() or hung_up(self._channel.socket):
            raise self._left()

    def _start_read(self, part: BlockCopyPlan) -> Callable[[], None]:
        _check_bounds(part, self._peer_bytes, self._own_bytes)
        source, target = self._mapping.regions[part.region], self._own[part.region]
        source += part.source
        target += part.target
        return self._queue.start(source, target, part.nbytes)

    def write(self, plan: BlockCopyPlan, cancelled: threading.Event) -> None:
        sizes = (self._own_bytes, self._peer_bytes)

        def start(part: BlockCopyPlan) -> Callable[[], None]:
            _check_bounds(part, *sizes)
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
            self._stream.close()
            for slot in (self._seen, *self._slots):
                slot.close()
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
                self._fetch_nonce(self._seen)
            finally:
                self._stream.synchronize()  # nothing of ours is written once this has returned
            if not cancelled.is_set():
                self.check(self._seen)

    def _fetch_nonce(self, slot: Slot) -> None:
        """Fetch the owner's nonce behind all copies so far; there when the slot's event has passed."""
        slot.words[:] = 0
        with driver.current(self._device):
            driver.copy_out(slot.address, self._mapping.nonce, NONCE_BYTES, self._stream.cuda_stream)
            slot.event.record(self._stream.cuda_stream)

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


def _check_bounds(part: BlockCopyPlan, source_bytes: Ints, target_bytes: Ints) -> None:
    """As check_bounds; in a quarter of the time where the regions of a side are equally long."""
    regions = min(len(source_bytes), len(target_bytes))
    named = int(part.region.min()) >= 0 and int(part.region.max()) < regions
    if not (named and _fit(part.source, part.nbytes, source_bytes) and _fit(part.target, part.nbytes, target_bytes)):
        check_bounds(part, source_bytes, target_bytes)


def _fit(offsets: Ints, nbytes: Ints, sizes: Ints) -> bool:
    """Whether runs of at most FIRST_BYTES lie inside even the shortest region."""
    end = int(sizes.min())
    return int(offsets.min()) >= 0 and int(offsets.max()) <= end and int((offsets + nbytes).max()) <= end


def _parts(plan: BlockCopyPlan, sizes: tuple[Ints, Ints]) -> Iterator[BlockCopyPlan]:
    """The plan in pieces, from FIRST_BYTES growing to PIECE_BYTES_MAX; made when asked for.

    Runs of a plan that is out of the ordinary are checked all together; the others when their part is started.
    """
    if not len(plan):
        return
    if int(plan.nbytes.min()) <= 0 or int(plan.nbytes.max()) > FIRST_BYTES:
        check_bounds(plan, *sizes)
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
