"""Moving pieces of scattered runs through an NCCL communicator: gather into staging, send; receive, scatter.

A stream that copies and one for each communicator, a ring of staging buffers, events between them: while piece k is on
the wire, piece k+1 is gathered (or piece k-1 scattered). The host enqueues and waits for nothing but its own bound on
how far it runs ahead, and for the end, which it looks for when it may be near. Everything a piece needs is made once:
the host's work for one is a launch, a call of NCCL and a few events (nccl_points.py).

Before a transfer starts, its two sides see to it that what is sent is complete and what is received into is unused.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import FleetError
from vllm_fleet.fabric.contract import TransferError
from vllm_fleet.fabric.plan import Ints
from vllm_fleet.fabric.transports.cuda import driver
from vllm_fleet.fabric.transports.cuda.communicator import Communicator
from vllm_fleet.fabric.transports.cuda.joining import Watch, mapped, poll
from vllm_fleet.fabric.transports.cuda.kernels import OCTETS, ROW_WORDS, TILE_BYTES, WARPS
from vllm_fleet.fabric.transports.cuda.launch import Kernel, programs
from vllm_fleet.fabric.transports.cuda.nccl_points import Point, is_quiet
from vllm_fleet.fabric.transports.cuda.nccl_tuning import TABLE_ROWS, TABLES, TABLES_BYTES, Tuning
from vllm_fleet.fabric.transports.cuda.pieces import Pieces

IDLE_S = 10.0
"""A transfer fails when no piece completes for so long."""
IDLE_SETTING = "fabric.transports.cuda.pipe.IDLE_S"

DRAIN_S = 30.0
"""After an abort the kernels must have left the streams within this time."""

AHEAD_MAX = 64  # pieces enqueued and not known complete: the CUDA launch queue holds 1024 launches

BYTES_PER_S = 400e9  # NVLink of an H200: nothing is there sooner

ROW_BYTES_MAX = TILE_BYTES  # longer runs are shared among multiprocessors

_FULL_ROW_BYTES = ROW_WORDS * 8
assert TABLES_BYTES == TABLES * TABLE_ROWS * _FULL_ROW_BYTES


class Pipe:
    """One communicator with its staging. For one thread, with CUDA device ``device`` current there.

    Streams of its own: those of torch are a pool, and one that a peer holds up would hold up others.
    """

    def __init__(self, communicator: Communicator, device: int, tuning: Tuning) -> None:
        self._communicator = communicator
        self._device = device
        self._chunk_bytes, self._buffers, self._programs = tuning.chunk_bytes, tuning.buffers, tuning.programs
        self._uploads: list[int] = []
        """Tuning.uploaded: the device's copy of each table."""
        with mapped("preparing the staging memory"):
            self._tables = [driver.Pinned(device, TABLE_ROWS * _FULL_ROW_BYTES) for _ in range(TABLES)]
            self._rows: list[Ints] = [table.words.reshape(-1, ROW_WORDS) for table in self._tables]
            if tuning.uploaded:
                self._uploads.extend(driver.allocate(device, TABLE_ROWS * _FULL_ROW_BYTES) for _ in range(TABLES))
            example = (self._tables[0].address, 1)
            self._kernel = Kernel(programs.copy_kernel, device, example, (TILE_BYTES, OCTETS), WARPS)
            self._streams = [driver.Stream(device) for _ in range(1 + communicator.lanes)]
            self._copying, *self._wires = (own.cuda_stream for own in self._streams)
            shape = (tuning.buffers, tuning.chunk_bytes)
            self._staging: Any = torch.empty(shape, dtype=torch.uint8, device=torch.device("cuda", device))
            torch.cuda.current_stream(device).synchronize()  # whoever used that memory before
            self._base = int(self._staging.data_ptr())
            if tuning.registered:
                communicator.register(self._base, tuning.buffers * tuning.chunk_bytes)
            self._between = [Point(device) for _ in range(tuning.buffers)]
            """Of each staging buffer: gathered, or received."""
            self._done = [Point(device) for _ in range(AHEAD_MAX)]
            """Piece number n of this pipe's life is complete: entry n % AHEAD_MAX."""
            self._read = [Point(device) for _ in range(TABLES)]
            """The kernels that read a table have ended."""
            self._warm_up()
        self._count = self._finished = 0
        """Pieces enqueued, and those known complete."""
        self._turn = 0
        self._due = 0.0
        """On the monotonic clock: when the pieces enqueued may be complete, at the earliest."""

    def send(self, pieces: Pieces, watch: Watch) -> None:
        """Enqueue sending all pieces; raises what ``watch`` raises, and TransferError."""
        with mapped("sending over NCCL"):
            copying, wires, done, send = self._copying, self._wires, self._done, self._communicator.send
            copy = self._copier(pieces, watch, gather=True)
            for index, size in enumerate(pieces.sizes):
                count = self._count
                slot, lane = count % self._buffers, count % len(wires)
                wire = wires[lane]
                self._await(count - AHEAD_MAX + 1, watch)
                if count - self._buffers >= self._finished:
                    done[(count - self._buffers) % AHEAD_MAX].hold(copying)
                copy(index)
                gathered = self._between[slot]
                gathered.record(copying)
                gathered.hold(wire)
                send(self._base + slot * self._chunk_bytes, size, wire, lane)
                done[count % AHEAD_MAX].record(wire)
                self._enqueued(size)

    def receive(self, pieces: Pieces, watch: Watch) -> None:
        """Enqueue receiving all pieces into their runs; errors as of send()."""
        with mapped("receiving over NCCL"):
            copying, wires, done, receive = self._copying, self._wires, self._done, self._communicator.receive
            copy = self._copier(pieces, watch, gather=False)
            for index, size in enumerate(pieces.sizes):
                count = self._count
                slot, lane = count % self._buffers, count % len(wires)
                wire = wires[lane]
                self._await(count - AHEAD_MAX + 1, watch)
                if count - self._buffers >= self._finished:
                    done[(count - self._buffers) % AHEAD_MAX].hold(wire)
                receive(self._base + slot * self._chunk_bytes, size, wire, lane)
                received = self._between[slot]
                received.record(wire)
                received.hold(copying)
                copy(index)
                done[count % AHEAD_MAX].record(copying)
                self._enqueued(size)

    def exchange(self, pattern: bytes, watch: Watch) -> bytes:
        """Send a few bytes in each lane and receive as many, which connects the two sides.

        What came: the pattern itself, or the first thing that differs from it.
        """
        self.drain(watch)
        came = [self._exchange(pattern, lane, watch) for lane in range(len(self._wires))]
        return next((other for other in came if other != pattern), pattern)

    def _exchange(self, pattern: bytes, lane: int, watch: Watch) -> bytes:
        nbytes, wire = len(pattern), self._wires[lane]
        with mapped("connecting over NCCL"), torch.cuda.stream(torch.cuda.ExternalStream(wire, self._device)):
            sent, received = self._staging[0], self._staging[1]
            sent[:nbytes].copy_(torch.frombuffer(bytearray(pattern), dtype=torch.uint8))
            received.zero_()
            deadline = Deadline.after(IDLE_S, IDLE_SETTING)
            # A whole chunk: NCCL chooses its protocol and its connections by the size.
            places = sent.data_ptr(), received.data_ptr(), self._chunk_bytes, wire
            self._communicator.exchange(*places, watch, deadline, lane)
            self._done[self._count % AHEAD_MAX].record(wire)
            self._enqueued(0)
            self.drain(watch)
            return bytes(received[:nbytes].cpu().numpy().tobytes())

    def drain(self, watch: Watch) -> None:
        """Wait until all pieces are complete. DeadlineExceeded when none completes for IDLE_S."""
        with mapped("moving bytes over NCCL"):
            self._await(self._count, watch, self._due)

    def await_copies(self, watch: Watch) -> None:
        """Wait until what send() enqueued has been read from the pool. DeadlineExceeded when it takes IDLE_S."""
        if self._finished < self._count:
            with mapped("moving bytes over NCCL"):
                self._wait(self._between[(self._count - 1) % self._buffers], watch, self._due)

    def abort(self) -> None:
        """End everything in flight, free the communicator and the staging. Safe to call twice.

        When this has returned no kernel of this pipe reads or writes memory any more.

        Raises:
            TransferError: the GPU has not let go of it within DRAIN_S.
        """
        if self._staging is None:
            return
        self._communicator.abort()
        deadline = Deadline.after(DRAIN_S, "fabric.transports.cuda.pipe.DRAIN_S")
        try:
            for stream in (*self._wires, self._copying):
                poll(functools.partial(is_quiet, stream), lambda: None, deadline, "the GPU", "ending NCCL's kernels")
        except FleetError as error:
            raise TransferError(f"memory of an aborted transfer may still be written: {error}") from error
        self._staging = None
        with contextlib.suppress(FleetError):  # after a failure of the GPU itself nothing can be given back
            self._rows.clear()
            for table in self._tables:
                table.close()
            while self._uploads:
                driver.free(self._device, self._uploads.pop())
            for point in (*self._between, *self._done, *self._read):
                point.close()
            for own in self._streams:
                own.close()

    def _warm_up(self) -> None:
        """Load the kernel and make the events now: loading may wait for kernels that run, which wait for a peer."""
        self._rows[0][0] = (self._base, self._base + self._chunk_bytes, 16, 0)
        for grid in range(1, self._programs + 1):
            self._kernel(grid, self._copying, (self._tables[0].address, 1))
        for point in (*self._between, *self._done, *self._read):
            point.record(self._copying)
        self._streams[0].synchronize()

    def _enqueued(self, nbytes: int) -> None:
        self._count += 1
        self._due = max(self._due, time.monotonic()) + nbytes / BYTES_PER_S

    def _staged(self, pieces: Pieces) -> Ints:
        """The staging address of each row of pieces that are enqueued from now on."""
        if len(pieces) == 1:
            return pieces.within + (self._base + self._count % self._buffers * self._chunk_bytes)
        begins = self._base + (self._count + np.arange(len(pieces))) % self._buffers * self._chunk_bytes
        return pieces.within + np.repeat(begins, np.diff(pieces.starts))

    def _copier(self, pieces: Pieces, watch: Watch, *, gather: bool) -> Callable[[int], None]:
        """A function that starts gathering (or scattering) the rows of one piece; called for each in order."""
        starts = pieces.starts.tolist()
        kernel, stream, most = self._kernel, self._copying, self._programs
        filled, offset = 0, 0  # rows put into tables, and which of them is first in the present one
        staged: Ints | None = None  # made when the first message is on its way

        def copy(index: int) -> None:
            nonlocal filled, offset, staged
            row, end = starts[index], starts[index + 1]
            while row < end:
                if row == filled:
                    staged = self._staged(pieces) if staged is None else staged
                    offset, filled = row, min(row + TABLE_ROWS, len(staged))
                    pooled, staging = pieces.address[offset:filled], staged[offset:filled]
                    sources, targets = (pooled, staging) if gather else (staging, pooled)
                    self._fill(sources, targets, pieces.nbytes[offset:filled], watch)
                count = min(end, filled) - row
                address = self._table(self._turn) + (row - offset) * _FULL_ROW_BYTES
                kernel(min(count, most), stream, (address, count))
                row += count

        return copy

    def _fill(self, sources: Ints, targets: Ints, nbytes: Ints, watch: Watch) -> None:
        """Put rows into the next table."""
        self._read[self._turn].record(self._copying)
        turn = (self._turn + 1) % TABLES
        self._wait(self._read[turn], watch)
        rows = self._rows[turn][: len(sources)]
        rows[:, 0], rows[:, 1], rows[:, 2] = sources, targets, nbytes
        self._turn = turn
        if self._uploads:
            content, table_bytes = self._tables[turn].address, len(rows) * _FULL_ROW_BYTES
            driver.copy_in(self._uploads[turn], content, table_bytes, self._copying)

    def _table(self, turn: int) -> int:
        """The address at which the kernels read a table."""
        return self._uploads[turn] if self._uploads else self._tables[turn].address

    def _await(self, count: int, watch: Watch, due: float = 0.0) -> None:
        """Wait until the first ``count`` pieces are complete, the last of them not before ``due``.

        DeadlineExceeded when none completes for IDLE_S.
        """
        while self._finished < count:
            self._wait(self._done[self._finished % AHEAD_MAX], watch, due)
            self._finished += 1

    def _wait(self, point: Point, watch: Watch, due: float = 0.0) -> None:
        """Wait for one point, of which the host knows that it will come."""
        if point.passed():
            return

        def both() -> None:
            watch()
            self._communicator.check()

        expected_s = max(0.0, due - time.monotonic())
        idle = Deadline.after(IDLE_S, IDLE_SETTING)
        poll(point.passed, both, idle, "the peer", "moving bytes over NCCL", expected_s)
