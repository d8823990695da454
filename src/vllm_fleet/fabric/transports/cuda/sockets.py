"""Bytes of a CUDA pool through a socket, by way of pinned host memory: GPU copy and network overlap (staging.py)."""

from __future__ import annotations

import contextlib

import numpy as np

from vllm_fleet.core.errors import FleetError
from vllm_fleet.fabric.plan import Ints
from vllm_fleet.fabric.transports.cuda.staging import HostReader, HostWriter
from vllm_fleet.net.channel import Channel
from vllm_fleet.net.scatter import receive_runs, send_runs


class StagedBytes:
    """For one connection and one thread at a time; 24 MiB of host and of device memory for each direction used."""

    def __init__(self, device: int) -> None:
        self.cuda: int | None = device
        self._reader = HostReader(device)
        self._writer = HostWriter(device)

    def send(self, channel: Channel, addresses: Ints, nbytes: Ints, idle_s: float) -> None:
        """Send runs of device memory, in order; errors as of send_runs, and TransferError when the GPU failed."""
        with contextlib.closing(self._reader.chunks(addresses, nbytes)) as chunks:
            for chunk in chunks:
                send_runs(channel.socket, *_one(chunk), idle_s, channel.peer)

    def receive(self, channel: Channel, addresses: Ints, nbytes: Ints, idle_s: float) -> None:
        """Receive into runs of device memory, in order; nothing is written any more when this returns or raises."""
        self._writer.begin(addresses, nbytes)
        try:
            while not self._writer.is_full():
                buffer = self._writer.buffer()
                receive_runs(channel.socket, *_one(buffer), idle_s, channel.peer)
                self._writer.commit(len(buffer))
            self._writer.finish()
        except BaseException:
            self._writer.abandon()
            raise

    def close(self) -> None:
        """Give the memory back."""
        with contextlib.suppress(FleetError):  # a GPU that failed gives nothing back
            self._reader.close()
            self._writer.close()


def _one(view: memoryview) -> tuple[Ints, Ints]:
    """A buffer as one run of host memory."""
    array = np.frombuffer(view, np.uint8)
    return np.array([array.ctypes.data], np.int64), np.array([len(view)], np.int64)
