"""The CUDA driver's functions on CPU memory: what the kernels' host side needs when Triton interprets them."""

from __future__ import annotations

import contextlib
import ctypes

import numpy as np
import pytest

from vllm_fleet.fabric.transports.cuda import driver, quick


class Pinned:
    def __init__(self, device: int, nbytes: int) -> None:
        whole = np.zeros(nbytes // 8 + 8, np.int64)
        skipped = -int(whole.ctypes.data) % 64 // 8
        self.words = whole[skipped : skipped + nbytes // 8]
        self.address = int(self.words.ctypes.data)

    def close(self) -> None:
        """Freed with its array."""


class Stream:
    def __init__(self, device: int) -> None:
        self.device, self.cuda_stream = device, 0

    def synchronize(self) -> None:
        """All has ended when it is started."""

    def close(self) -> None:
        """Nothing is kept."""


class Event:
    def __init__(self, device: int) -> None:
        """Nothing is kept."""

    def record(self, stream: int) -> None:
        """All has ended when it is started."""

    def passed(self) -> bool:
        return True

    def wait(self) -> None:
        """At once."""

    def close(self) -> None:
        """Nothing is kept."""


class Memory:
    """Device memory that was allocated."""

    def __init__(self) -> None:
        self.kept: dict[int, Pinned] = {}

    def allocate(self, device: int, nbytes: int) -> int:
        made = Pinned(device, nbytes)
        made.words[:] = -1
        self.kept[made.address] = made
        return made.address

    def free(self, device: int, address: int) -> None:
        del self.kept[address]


def copy(to: int, start: int, nbytes: int, stream: int) -> None:
    ctypes.memmove(to, start, nbytes)


def clear(address: int, nbytes: int, stream: int) -> None:
    ctypes.memset(address, 0, nbytes)


def install(monkeypatch: pytest.MonkeyPatch) -> Memory:
    """Let the modules under test use these; what they allocate and do not free stays in the memory returned."""
    memory = Memory()
    for name, stand_in in {
        "Pinned": Pinned,
        "Stream": Stream,
        "Event": Event,
        "current": lambda device: contextlib.nullcontext(),
        "allocate": memory.allocate,
        "free": memory.free,
        "copy_in": copy,
        "copy_out": copy,
        "clear": clear,
    }.items():
        monkeypatch.setattr(driver, name, stand_in)
    monkeypatch.setattr(quick, "Event", Event)
    monkeypatch.setattr(quick, "Here", lambda device: contextlib.nullcontext())
    return memory
