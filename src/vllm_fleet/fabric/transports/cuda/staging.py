"""Pinned host memory between a CUDA pool and a socket: GPU copy and network overlapped.

Sending: a kernel gathers piece k+1 into device staging and the copy engine brings it to pinned memory while the caller
sends piece k. Receiving: the caller fills piece k while pieces before it go to the device and are scattered.
Memory per direction: BUFFERS x CHUNK_BYTES on the host and as much on the device (24 MiB each), made at first use.

The pool's owner sees to it that what is read is complete, and what is written is unused, before a transfer starts.
Objects serve one thread at a time, and one transfer after another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from typing import Any

import numpy as np
import torch

from vllm_fleet.core.deadline import Deadline
from vllm_fleet.fabric.plan import Ints
from vllm_fleet.fabric.transports.cuda import driver
from vllm_fleet.fabric.transports.cuda.communicator import mapped, poll
from vllm_fleet.fabric.transports.cuda.kernels import CopyQueue
from vllm_fleet.fabric.transports.cuda.pieces import Piece, Pieces, cut, uniform

CHUNK_BYTES = 8 << 20
BUFFERS = 3

COPY_S = 10.0
"""A copy of one chunk between device and host takes under 1 ms; one that takes so long is a broken GPU."""
COPY_SETTING = "fabric.transports.cuda.staging.COPY_S"


class _Ring:
    """Pinned host buffers, each with a device buffer of the same size, and one stream."""

    def __init__(self, device: int, chunk_bytes: int, buffers: int) -> None:
        self.device, self.chunk_bytes, self.buffers = device, chunk_bytes, buffers
        with mapped("allocating pinned staging memory"), torch.cuda.device(device):
            shape = (buffers, chunk_bytes)
            self._own = driver.Stream(device)
            self.stream = torch.cuda.ExternalStream(self._own.cuda_stream, device)
            self.queue = CopyQueue(device, self._own.cuda_stream)
            self.on_device: Any = torch.empty(shape, dtype=torch.uint8, device=torch.device("cuda", device))
            torch.cuda.current_stream(device).synchronize()  # whoever used that memory before
            # Not torch's pinned memory: freeing that records events on streams that may be gone by then, and crashes.
            self._pinned = [driver.Pinned(device, -(-chunk_bytes // 8) * 8) for _ in range(buffers)]
        self.views = [pinned.words.view(np.uint8).data[:chunk_bytes] for pinned in self._pinned]
        self.base = int(self.on_device.data_ptr())
        self.running: deque[Any] = deque()
        """Events of chunks that are being copied, oldest first."""

    def gather(self, piece: Piece, slot: int) -> None:
        """Start bringing a piece of device memory into a pinned buffer."""
        targets = self.base + slot * self.chunk_bytes + piece.within
        with mapped("copying from the GPU"), driver.current(self.device):
            self.queue.start(piece.address, targets, piece.nbytes)
            content, address = self._pinned[slot].address, self.base + slot * self.chunk_bytes
            driver.copy_out(content, address, piece.total_bytes, self._own.cuda_stream)
            self._remember()

    def scatter(self, piece: Piece, slot: int) -> None:
        """Start bringing a pinned buffer to a piece of device memory."""
        sources = self.base + slot * self.chunk_bytes + piece.within
        with mapped("copying to the GPU"), driver.current(self.device):
            content, address = self._pinned[slot].address, self.base + slot * self.chunk_bytes
            driver.copy_in(address, content, piece.total_bytes, self._own.cuda_stream)
            self.queue.start(sources, piece.address, piece.nbytes)
            self._remember()

    def await_oldest(self) -> None:
        """Wait until the chunk that was started first is copied. DeadlineExceeded when the GPU does not."""
        with mapped("copying between GPU and host"):
            deadline = Deadline.after(COPY_S, COPY_SETTING)
            poll(self.running[0].query, _never, deadline, "the GPU", "copying a chunk")
            self.running.popleft()

    def quiesce(self) -> None:
        """Wait until nothing is being copied."""
        while self.running:
            self.await_oldest()

    def close(self) -> None:
        """Wait until nothing is being copied, and give stream and memory back; no view of it may be used any more."""
        self.quiesce()
        self.views.clear()
        for pinned in self._pinned:
            pinned.close()
        self.queue.close()
        self._own.close()

    def _remember(self) -> None:
        event = torch.cuda.Event()
        with torch.cuda.device(self.device):
            event.record(self.stream)
        self.running.append(event)


class HostReader:
    """Brings scattered runs of a CUDA pool to the host, to be sent.

    ``for chunk in reader.chunks(addresses, nbytes): socket.sendall(chunk)``
    """

    def __init__(self, device: int, *, chunk_bytes: int = CHUNK_BYTES, buffers: int = BUFFERS) -> None:
        self._device, self._chunk_bytes, self._buffers = device, chunk_bytes, buffers
        self._ring: _Ring | None = None

    def chunks(self, addresses: Ints, nbytes: Ints) -> Generator[memoryview, None, None]:
        """The bytes of all runs in order, in chunks of ``chunk_bytes`` (the last may be shorter).

        Args:
            addresses, nbytes: device addresses and lengths, arrays of shape [runs].

        A chunk stays valid until the next one is asked for. When the iterator has ended or is closed, which leaving
        the loop early does not do by itself (contextlib.closing), nothing of the pool is being read any more.

        Raises:
            TransferError, DeadlineExceeded: the GPU failed.
        """
        pieces = cut(addresses, nbytes, uniform(int(nbytes.sum()), self._chunk_bytes))
        ring = self._ring = self._ring or _Ring(self._device, self._chunk_bytes, self._buffers)
        started = 0
        try:
            for index in range(len(pieces)):
                # The buffer of the chunk before this one is free again: its consumer has asked for this one.
                while started < min(index + ring.buffers, len(pieces)):
                    ring.gather(pieces[started], started % ring.buffers)
                    started += 1
                ring.await_oldest()
                yield ring.views[index % ring.buffers][: pieces[index].total_bytes]
        finally:
            ring.quiesce()

    def close(self) -> None:
        """Give the staging back; the next use makes it anew. Not while chunks() runs."""
        if self._ring is not None:
            self._ring.close()
            self._ring = None


class HostWriter:
    """Brings received bytes to scattered runs of a CUDA pool.

    ``writer.begin(addresses, nbytes)``, then until ``writer.is_full()``: receive into ``writer.buffer()`` and
    ``writer.commit(received)``; at last ``writer.finish()``. After a failure ``writer.abandon()``.
    """

    def __init__(self, device: int, *, chunk_bytes: int = CHUNK_BYTES, buffers: int = BUFFERS) -> None:
        self._device, self._chunk_bytes, self._buffers = device, chunk_bytes, buffers
        self._ring: _Ring | None = None
        self._pieces: Pieces = cut(_NONE, _NONE, [])
        self._index = 0
        self._filled = 0

    def begin(self, addresses: Ints, nbytes: Ints) -> None:
        """What comes now goes to these runs, in order: device addresses and lengths, arrays of shape [runs]."""
        self.abandon()
        self._pieces = cut(addresses, nbytes, uniform(int(nbytes.sum()), self._chunk_bytes))
        if self._ring is None:
            self._ring = _Ring(self._device, self._chunk_bytes, self._buffers)

    def is_full(self) -> bool:
        """Whether bytes for all runs have been committed."""
        return self._index == len(self._pieces)

    def buffer(self) -> memoryview:
        """Where to receive next: writable, at least one byte, never more than is still expected. Not when is_full().

        Waits until the oldest chunk has left its buffer where all are in use.
        """
        ring = self._require_ring()
        while len(ring.running) >= ring.buffers:
            ring.await_oldest()
        view = ring.views[self._index % ring.buffers]
        return view[self._filled : self._pieces[self._index].total_bytes]

    def commit(self, nbytes: int) -> None:
        """The first ``nbytes`` of what buffer() gave last have been filled."""
        piece = self._pieces[self._index]
        self._filled += nbytes
        assert self._filled <= piece.total_bytes
        if self._filled == piece.total_bytes:
            ring = self._require_ring()
            ring.scatter(piece, self._index % ring.buffers)
            self._index, self._filled = self._index + 1, 0

    def finish(self) -> None:
        """Wait until everything committed is in the pool."""
        if self._ring is not None:
            self._ring.quiesce()

    def abandon(self) -> None:
        """Drop what has not been committed; when this has returned nothing writes to the pool any more."""
        self.finish()
        self._pieces, self._index, self._filled = cut(_NONE, _NONE, []), 0, 0

    def close(self) -> None:
        """Give the staging back; the next begin() makes it anew."""
        self.abandon()
        if self._ring is not None:
            self._ring.close()
            self._ring = None

    def _require_ring(self) -> _Ring:
        assert self._ring is not None, "begin() comes first"
        return self._ring


def _never() -> None:
    """A copy inside one host is not interrupted: it is over in a moment."""


_NONE: Ints = np.zeros(0, np.int64)
