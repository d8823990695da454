"""The host side of the Triton kernels: copy runs between device addresses, and checksums of runs.

    copy_runs(sources, targets, nbytes, device=0, stream=stream)      # enqueues; addresses may be IPC mappings
    digest_runs(addresses, nbytes, device=0, stream=stream)           # waits; uint64 of shape [runs], as fabric.digest

Run tables lie in pinned host memory and the kernel reads them from there: no upload, one launch (a ReadQueue's table is
the caller's, in any memory). Under
TRITON_INTERPRET=1 both work on CPU addresses, which is how they are tested without a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vllm_fleet.fabric import digest
from vllm_fleet.fabric.plan import Ints
from vllm_fleet.fabric.transports.cuda import driver
from vllm_fleet.fabric.transports.cuda.launch import INTERPRETED, Kernel
from vllm_fleet.fabric.transports.cuda.launch import programs as triton_kernels

PROGRAMS = 64  # of 132 multiprocessors: enough for NVLink, the rest goes on computing
WARPS = 8
TILE_BYTES = 32 << 10  # in flight per program
OCTETS = 4096  # of the byte path per step
PART_BYTES_MAX = 1 << 20  # longer runs are split, shorter than this when there are few
DIGEST_TILE = 1024  # words
DIGEST_WARPS = 4
DIGEST_PROGRAMS = 1024
DIGEST_PART_BYTES_MAX = 256 << 10
TABLES = 4  # calls on one stream that may be under way; one more waits for the oldest
LEAD_RUNS = 2048
LEAD_RUNS_MIN = 16384  # in a call of more runs, LEAD_RUNS of them are started first
QUEUES_MAX = 64  # streams with tables of their own; the one used longest ago gives its own up
ROW_WORDS = 4
ADDRESS = 1 << 40  # as an example of an argument: one of 64 bits
COUNTER_BYTES = 64
_CONSTANTS = (digest.POSITION, digest.FIRST, digest.SECOND, digest.SHIFT, DIGEST_TILE)


class StreamLike(Protocol):
    """torch.cuda.Stream or driver.Stream."""

    @property
    def cuda_stream(self) -> int:
        """The CUstream."""
        ...


class _Table:
    """Rows of one call: pinned memory that grows, and the event after which it may be written again."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._pinned: driver.Pinned | None = None
        self._event = None if INTERPRETED else driver.Event(device)
        self._busy = False
        self.address = 0
        self._rows: Ints = np.zeros((0, ROW_WORDS), np.int64)

    def rows(self, count: int) -> Ints:
        """Room for ``count`` rows, of shape [count, ROW_WORDS]; waits until the last call's kernel has ended."""
        self.wait()
        if count > len(self._rows):
            capacity = max(1024, 1 << (count - 1).bit_length())
            if INTERPRETED:
                self._rows = np.zeros((capacity, ROW_WORDS), np.int64)
                self.address = int(self._rows.ctypes.data)
            else:
                if self._pinned is not None:
                    self._pinned.close()
                self._pinned = driver.Pinned(self._device, capacity * ROW_WORDS * 8)
                self._rows, self.address = self._pinned.words.reshape(-1, ROW_WORDS), self._pinned.address
        return self._rows[:count]

    def used(self, stream: int) -> None:
        """The kernel that reads the rows has been started on ``stream``."""
        if self._event is not None:
            self._event.record(stream)
            self._busy = True

    def wait(self) -> None:
        """Wait for that kernel."""
        if self._event is not None and self._busy:
            self._event.wait()
            self._busy = False

    def close(self) -> None:
        self.wait()
        if self._pinned is not None:
            self._rows = np.zeros((0, ROW_WORDS), np.int64)
            self._pinned.close()
        if self._event is not None:
            self._event.close()


class CopyQueue:
    """Copies on one stream, in order. For one thread at a time."""

    def __init__(self, device: int, stream: int, *, programs: int = PROGRAMS, warps: int = WARPS) -> None:
        self._device, self._stream = device, stream
        self._programs, self._warps = programs, warps
        self._kernel: Kernel | None = None
        self._tables = [_Table(device) for _ in range(TABLES)]
        self._turn = 0

    def start(self, sources: Ints, targets: Ints, nbytes: Ints) -> Callable[[], None]:
        """Start copying runs; three arrays of shape [runs]: addresses in this device's context, and lengths.

        What is called to wait for this copy. Source and target must not overlap.
        """
        sources, targets, nbytes = _split(sources, targets, nbytes, self._programs)
        if len(nbytes) > LEAD_RUNS_MIN:  # the GPU copies the first ones while the host fills the table for the rest
            self._start(sources[:LEAD_RUNS], targets[:LEAD_RUNS], nbytes[:LEAD_RUNS])
            sources, targets, nbytes = sources[LEAD_RUNS:], targets[LEAD_RUNS:], nbytes[LEAD_RUNS:]
        return self._start(sources, targets, nbytes) if len(nbytes) else lambda: None

    def _start(self, sources: Ints, targets: Ints, nbytes: Ints) -> Callable[[], None]:
        count = len(nbytes)
        table = self._tables[self._turn]
        self._turn = (self._turn + 1) % TABLES
        rows = table.rows(count)
        rows[:, 0], rows[:, 1], rows[:, 2] = sources, targets, nbytes
        arguments = (table.address, count)
        if self._kernel is None:
            constants = (TILE_BYTES, OCTETS)
            self._kernel = Kernel(triton_kernels.copy_kernel, self._device, (ADDRESS, 1), constants, self._warps)
        with nullcontext() if INTERPRETED else driver.current(self._device):
            self._kernel(min(count, self._programs), self._stream, arguments)
            table.used(self._stream)
        return table.wait

    def close(self) -> None:
        """Wait for what runs and give the tables back."""
        for table in self._tables:
            table.close()


def part_bytes(total: int, programs: int = PROGRAMS) -> int:
    """The longest run that a copy of ``total`` bytes should have: an even share of the work, in whole tiles."""
    return max(TILE_BYTES, min(PART_BYTES_MAX, total // (programs * 8)) // TILE_BYTES * TILE_BYTES)


class ReadQueue:
    """Reads on one stream, in order, whose end is seen in host memory (programs.read_kernel). For one thread at a time.

    ``nonce``: the address of four words that are read when all else has been.
    """

    def __init__(self, device: int, stream: int, nonce: int) -> None:
        self._device, self._stream, self._nonce = device, stream, nonce
        example = (ADDRESS, 1, ADDRESS, ADDRESS, ADDRESS)
        self.kernel = Kernel(triton_kernels.read_kernel, device, example, (TILE_BYTES, OCTETS), WARPS)
        self._arrived = driver.allocate(device, COUNTER_BYTES)
        with driver.current(device):
            driver.clear(self._arrived, COUNTER_BYTES, stream)

    def start(self, table: int, count: int, seen: int) -> None:
        """Start copying the ``count`` runs of a table at an address; then, unless ``seen`` is 0, the nonce to ``seen``.

        The device's context is current. The table is used until the nonce has arrived, or the stream got so far.
        """
        self.kernel(min(count, PROGRAMS), self._stream, (table, count, self._arrived, self._nonce, seen))

    def close(self) -> None:
        """Give the counter back; the stream has ended all."""
        driver.free(self._device, self._arrived)


def _split(sources: Ints, targets: Ints, nbytes: Ints, programs: int) -> tuple[Ints, Ints, Ints]:
    """The same copies with no run longer than it should be."""
    if not len(nbytes):
        return sources, targets, nbytes
    longest = int(nbytes.max())
    if longest <= TILE_BYTES or longest <= (part := part_bytes(int(nbytes.sum()), programs)):
        return sources, targets, nbytes
    index, skipped, lengths = _parts(nbytes, part)
    return sources[index] + skipped, targets[index] + skipped, lengths


def _parts(nbytes: Ints, part: int) -> tuple[Ints, Ints, Ints]:
    """Runs cut into parts of ``part`` bytes: each part's run, its offset in the run and its length."""
    parts = np.maximum(1, -(-nbytes // part))
    index = np.repeat(np.arange(len(nbytes)), parts)
    skipped = (np.arange(len(index)) - np.repeat(np.cumsum(parts) - parts, parts)) * part
    return index, skipped, np.minimum(nbytes[index] - skipped, part)


_queues: dict[tuple[int, int, int], CopyQueue] = {}
_queues_lock = threading.Lock()


def copy_runs(
    sources: Ints, targets: Ints, nbytes: Ints, *, device: int, stream: StreamLike, programs: int = PROGRAMS
) -> None:
    """Enqueue on ``stream`` a copy of runs between addresses that ``device`` can reach; arrays of shape [runs], int64.

    Returns before the copy has ended. At most TABLES calls are under way on one stream; one more waits.
    """
    key = (device, stream.cuda_stream, programs)
    with _queues_lock:
        queue = _queues.pop(key, None)
        if queue is None:
            if len(_queues) >= QUEUES_MAX:
                _queues.pop(next(iter(_queues))).close()
            queue = CopyQueue(device, stream.cuda_stream, programs=programs)
        _queues[key] = queue
        queue.start(sources, targets, nbytes)


class _Digester:
    """Sums on one device, and the table for them."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._table = _Table(device)
        self._capacity = 0
        self._sums = 0
        self._host: driver.Pinned | None = None
        self._words: Ints = np.zeros(0, np.int64)
        self._kernel: Kernel | None = None

    def sums(self, addresses: Ints, nbytes: Ints, stream: int) -> digest.Words:
        """The sum of each run's mixed words."""
        share = int(nbytes.sum()) // DIGEST_PROGRAMS
        step = DIGEST_TILE * digest.WORD_BYTES
        index, skipped, lengths = _parts(nbytes, max(step, min(DIGEST_PART_BYTES_MAX, share) // step * step))
        rows = self._table.rows(len(index))
        rows[:, 0], rows[:, 1] = addresses[index] + skipped, lengths
        rows[:, 2], rows[:, 3] = skipped // digest.WORD_BYTES, index
        grid = min(len(index), DIGEST_PROGRAMS)
        sums = self._reserve(len(nbytes))
        arguments = (self._table.address, sums, len(index))
        if self._kernel is None:
            self._kernel = Kernel(triton_kernels.digest_kernel, self._device, arguments, _CONSTANTS, DIGEST_WARPS)
        if INTERPRETED:
            self._kernel(grid, stream, arguments)
            return self._words[: len(nbytes)].view(np.uint64)
        assert self._host is not None
        with driver.current(self._device):
            driver.clear(sums, len(nbytes) * 8, stream)
            self._kernel(grid, stream, arguments)
            driver.copy_out(self._host.address, sums, len(nbytes) * 8, stream)
            self._table.used(stream)
        self._table.wait()
        return self._host.words[: len(nbytes)].view(np.uint64).copy()

    def _reserve(self, runs: int) -> int:
        """The address of zeros for ``runs`` sums (on a GPU: of room for them)."""
        if INTERPRETED:
            self._words = np.zeros(runs, np.int64)
            return int(self._words.ctypes.data)
        if self._host is None or runs > self._capacity:
            if self._host is not None:
                self._host.close()
                driver.free(self._device, self._sums)
            self._capacity = max(1024, 1 << (runs - 1).bit_length())
            self._host = driver.Pinned(self._device, self._capacity * 8)
            self._sums = driver.allocate(self._device, self._capacity * 8)
        return self._sums


_digesters: dict[int, tuple[threading.Lock, _Digester]] = {}
_digest_streams: dict[int, driver.Stream] = {}


def digest_runs(addresses: Ints, nbytes: Ints, *, device: int, stream: StreamLike) -> NDArray[np.uint64]:
    """Digests (fabric.digest.mix64) of runs at addresses that ``device`` can reach; arrays of shape [runs].

    Waits until ``stream`` has worked them out. One call at a time on each device.
    """
    if not len(nbytes):
        return np.zeros(0, np.uint64)
    with _queues_lock:
        if device not in _digesters:
            _digesters[device] = (threading.Lock(), _Digester(device))
        lock, digester = _digesters[device]
    with lock:
        return digest.finish(digester.sums(addresses, nbytes, stream.cuda_stream), nbytes)


def digest_pool_runs(addresses: Ints, nbytes: Ints, device: int) -> NDArray[np.uint64]:
    """digest_runs on a stream of the device's own, which waits for no computation."""
    with _queues_lock:
        if device not in _digest_streams:
            _digest_streams[device] = driver.Stream(device)
    return digest_runs(addresses, nbytes, device=device, stream=_digest_streams[device])
