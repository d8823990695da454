"""The memory that the conformance suite moves: one small interface, in CPU memory here and in CUDA memory elsewhere."""

from __future__ import annotations

import importlib
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vllm_fleet.fabric.contract import KVPool, Region

Bytes = NDArray[np.uint8]
REGIONS = 2


class Memory(Protocol):
    """REGIONS regions of equal blocks. Filled and read back as arrays of shape [blocks, block_bytes], one per region.

    CUDA memory comes from tests/contract/cuda_pool.py: ``make(blocks, block_bytes, device)`` gives one of these.
    """

    pool: KVPool

    def fill(self, arrays: list[Bytes]) -> None:
        """Put these bytes there; they are there when it returns."""
        ...

    def read_back(self) -> list[Bytes]:
        """Copies of what is there now."""
        ...

    def free(self) -> None:
        """Give the memory back to the system."""
        ...


class CpuMemory:
    """Memory of NumPy arrays."""

    def __init__(self, blocks: int, block_bytes: int) -> None:
        self._arrays = [np.zeros((blocks, block_bytes), np.uint8) for _ in range(REGIONS)]
        at = [int(array.ctypes.data) for array in self._arrays]
        regions = tuple(Region(a, blocks * block_bytes, block_bytes, block_bytes, blocks) for a in at)
        self.pool = KVPool(regions)

    def fill(self, arrays: list[Bytes]) -> None:
        for array, content in zip(self._arrays, arrays, strict=True):
            array[:] = content

    def read_back(self) -> list[Bytes]:
        return [array.copy() for array in self._arrays]

    def free(self) -> None:
        self._arrays = []


def make_memory(blocks: int, block_bytes: int, *, cuda: int | None) -> Memory:
    """Zeros, in CPU memory or on a CUDA device."""
    if cuda is None:
        return CpuMemory(blocks, block_bytes)
    memory: Memory = importlib.import_module("tests.contract.cuda_pool").make(blocks, block_bytes, cuda)
    return memory


def pattern(blocks: int, block_bytes: int, seed: int) -> list[Bytes]:
    """Random bytes, equal for equal seeds in every process."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (blocks, block_bytes), np.uint8) for _ in range(REGIONS)]


def constant(blocks: int, block_bytes: int, value: int) -> list[Bytes]:
    """One value everywhere."""
    return [np.full((blocks, block_bytes), value, np.uint8) for _ in range(REGIONS)]
