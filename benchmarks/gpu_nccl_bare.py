"""The wire of the nccl transport without its conversation: messages between two GPUs, with and without their copies.

Both processes enqueue the same messages the way cuda/pipe.py does. A short message goes ahead; the reader's clock (CUDA
events) runs from its arrival to the last scatter, so the owner's first gather and its work on the host are in it, the
question and the threads that it wakes are not.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from vllm_fleet.core.deadline import Deadline
from vllm_fleet.fabric.plan import Ints
from vllm_fleet.fabric.rendezvous import Rendezvous
from vllm_fleet.fabric.transports.cuda import driver
from vllm_fleet.fabric.transports.cuda.communicator import Communicator
from vllm_fleet.fabric.transports.cuda.kernels import OCTETS, ROW_WORDS, TILE_BYTES, WARPS
from vllm_fleet.fabric.transports.cuda.launch import Kernel, programs
from vllm_fleet.fabric.transports.cuda.nccl_pieces import message_sizes
from vllm_fleet.fabric.transports.cuda.nccl_tuning import Tuning

BLOCK = 32 << 10
MIB = 1 << 20
LAYOUTS = ((10, 6), (15, 4), (20, 3), (31, 2))
"""MiB of a staging buffer, and how many: up to 62 MiB."""
CTAS = (8, 16, 32)
LANES = 3
NO_COPY = "none"
EVENTS = 160  # pieces of one transfer: 1 GiB in 10 MiB, and some
ROW_BYTES = ROW_WORDS * 8
SYNC_BYTES = 64 << 10


@dataclass(frozen=True)
class Way:
    """One way to move the bytes."""

    chunk_mib: int
    buffers: int
    lanes: int
    ctas: int
    registered: bool = False
    grouped: bool = False
    """Messages that follow one another in one ncclGroup: one for each lane, or two of the only lane."""
    copy: str = NO_COPY
    """Where the gather and scatter kernels read their rows: "pinned" host memory or "uploaded"; or no kernels."""
    programs: int = 0

    def sizes(self, nbytes: int) -> list[int]:
        return message_sizes(nbytes, self.chunk_mib * MIB)

    def __str__(self) -> str:
        parts = [f"{self.chunk_mib:2} MiB x {self.buffers}", f"{self.lanes} x {self.ctas:2} CTAs"]
        parts += ["registered"] * self.registered + ["grouped"] * self.grouped
        if self.copy != NO_COPY:
            parts += [f"{self.copy} {self.programs}"]
        return ", ".join(parts)


def wire_ways() -> Iterator[Way]:
    """Messages alone."""
    for (mib, buffers), lanes, ctas in itertools.product(LAYOUTS, range(1, LANES + 1), CTAS):
        if ctas * lanes >= 16 and lanes <= buffers:
            for registered, grouped in itertools.product((False, True), repeat=2):
                yield Way(mib, buffers, lanes, ctas, registered, grouped)


def full_ways() -> Iterator[Way]:
    """With gather and scatter; with as many lanes as buffers one would never be copied while another moves."""
    for (mib, buffers), lanes, ctas in itertools.product(LAYOUTS, range(1, LANES + 1), CTAS):
        if ctas * lanes < 16 or lanes >= buffers:
            continue
        for copy, grid, registered in itertools.product(("pinned", "uploaded"), (32, 64, 96), (False, True)):
            yield Way(mib, buffers, lanes, ctas, registered, False, copy, grid)
        if lanes > 1:
            yield Way(mib, buffers, lanes, ctas, False, True, "pinned", 64)


class Side:
    """One process's half: communicators for each number of CTAs, two stagings, streams, events, tables."""

    def __init__(self, rendezvous: Rendezvous, device: int, pool: int, pool_bytes: int) -> None:
        self._device, self._pool, self._blocks = device, pool, pool_bytes // BLOCK
        self._streams = [driver.Stream(device) for _ in range(1 + LANES)]
        self._raw = [stream.cuda_stream for stream in self._streams]
        self._copying, *self._wires = (torch.cuda.ExternalStream(raw, device) for raw in self._raw)
        self._staging: Any = torch.empty((2, 63 * MIB), dtype=torch.uint8, device=torch.device("cuda", device))
        self._bases = [int(half.data_ptr()) for half in self._staging]
        self._between = [torch.cuda.Event() for _ in range(EVENTS)]
        self._done = [torch.cuda.Event() for _ in range(EVENTS)]
        self._ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._kernel = Kernel(programs.copy_kernel, device, (1 << 40, 1), (TILE_BYTES, OCTETS), WARPS)
        self._tables: dict[tuple[object, ...], tuple[driver.Pinned, int, list[int]]] = {}
        torch.cuda.synchronize(device)
        soon = Deadline.after(60, "bench")
        self._comms = {}
        for ctas in CTAS:
            tuning = Tuning(chunk_bytes=MIB, ctas_max=ctas, lanes=LANES)
            comm = self._comms[ctas] = Communicator(rendezvous, device, tuning, lambda: None, soon)
            for lane in range(LANES):
                plain, other = self._bases
                comm.exchange(plain, other, MIB, self._raw[1 + lane], lambda: None, soon, lane)
                self._wires[lane].synchronize()
            comm.register(self._bases[1], 63 * MIB)

    def prepare(self, way: Way, nbytes: int, *, sending: bool) -> None:
        """Make the table of rows of one way and size: scattered blocks of the pool, and their places in the staging."""
        sizes = way.sizes(nbytes)
        key = (way.chunk_mib, way.buffers, way.registered, nbytes)
        if way.copy == NO_COPY or key in self._tables:
            return
        counts = np.array([size // BLOCK for size in sizes], np.int64)
        starts = np.r_[0, np.cumsum(counts)]
        rows = int(starts[-1])
        piece = np.repeat(np.arange(len(sizes)), counts)
        within = (np.arange(rows) - starts[piece]) * BLOCK
        staged: Ints = self._bases[way.registered] + piece % way.buffers * way.chunk_mib * MIB + within
        order = np.random.default_rng(nbytes).permutation(self._blocks)[:rows]
        pooled: Ints = self._pool + order.astype(np.int64) * BLOCK
        table = driver.Pinned(self._device, rows * ROW_BYTES)
        filled = table.words.reshape(-1, ROW_WORDS)
        filled[:, 0], filled[:, 1] = (pooled, staged) if sending else (staged, pooled)
        filled[:, 2], filled[:, 3] = BLOCK, 0
        self._tables[key] = (table, driver.allocate(self._device, rows * ROW_BYTES), starts.tolist())

    def move(self, way: Way, nbytes: int, *, sending: bool) -> float:
        """Enqueue one transfer; seconds that the host took."""
        began = time.perf_counter()
        sync = self._comms[way.ctas].send if sending else self._comms[way.ctas].receive
        sync(self._bases[0] + 62 * MIB, SYNC_BYTES, self._raw[1], 0)  # a place that no piece is in
        self._ends[0].record(self._wires[0])
        for stream in (self._copying, *self._wires[1:]):
            self._ends[0].wait(stream)
        at = way.lanes if way.lanes > 1 else 2
        sizes = way.sizes(nbytes)
        for start in range(0, len(sizes), at if way.grouped else 1):
            group = range(start, min(len(sizes), start + at) if way.grouped else start + 1)
            (self._send if sending else self._receive)(way, nbytes, sizes, group)
        for wire in self._wires:
            self._done[-1].record(wire)
            self._done[-1].wait(self._copying)
        self._ends[1].record(self._copying)
        return time.perf_counter() - began

    def wait(self) -> float:
        """Wait for the transfer; seconds between the first message and the end."""
        self._ends[1].synchronize()
        return float(self._ends[0].elapsed_time(self._ends[1])) / 1000

    def _send(self, way: Way, nbytes: int, sizes: list[int], group: range) -> None:
        for index in group:
            if way.copy == NO_COPY:
                continue
            if index >= way.buffers:
                self._done[index - way.buffers].wait(self._copying)
            self._copy(way, nbytes, index)
            self._between[index].record(self._copying)
            self._between[index].wait(self._wires[index % way.lanes])
        self._message(way, sizes, group, self._comms[way.ctas].send)
        for index in group:
            self._done[index].record(self._wires[index % way.lanes])

    def _receive(self, way: Way, nbytes: int, sizes: list[int], group: range) -> None:
        for index in group:
            if way.copy != NO_COPY and index >= way.buffers:
                self._done[index - way.buffers].wait(self._wires[index % way.lanes])
        self._message(way, sizes, group, self._comms[way.ctas].receive)
        for index in group:
            if way.copy == NO_COPY:
                continue
            self._between[index].record(self._wires[index % way.lanes])
            self._between[index].wait(self._copying)
            self._copy(way, nbytes, index)
            self._done[index].record(self._copying)

    def _message(self, way: Way, sizes: list[int], group: range, call: Any) -> None:
        comm, base = self._comms[way.ctas], self._bases[way.registered]
        if len(group) > 1:
            comm.group_start()
        for index in group:
            lane = index % way.lanes
            call(base + index % way.buffers * way.chunk_mib * MIB, sizes[index], self._raw[1 + lane], lane)
        if len(group) > 1:
            comm.group_end()

    def _copy(self, way: Way, nbytes: int, index: int) -> None:
        table, uploaded, starts = self._tables[way.chunk_mib, way.buffers, way.registered, nbytes]
        address = table.address
        if way.copy == "uploaded":
            address = uploaded
            if index < 2:  # the first piece's rows alone, then all others
                first, last = (0, starts[1]) if index == 0 else (starts[1], starts[-1])
                place = first * ROW_BYTES
                driver.copy_in(uploaded + place, table.address + place, (last - first) * ROW_BYTES, self._raw[0])
        count = starts[index + 1] - starts[index]
        self._kernel(min(count, way.programs), self._raw[0], (address + starts[index] * ROW_BYTES, count))

    def gather_alone(self, way: Way, nbytes: int) -> float:
        """Seconds of the copy kernels of one transfer with nothing else under way."""
        self._ends[0].record(self._copying)
        for index in range(len(way.sizes(nbytes))):
            self._copy(way, nbytes, index)
        self._ends[1].record(self._copying)
        return self.wait()

    def close(self) -> None:
        for comm in self._comms.values():
            comm.abort()


def described(way: Way) -> dict[str, object]:
    return asdict(way)
