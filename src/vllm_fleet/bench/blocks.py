"""Pools of recognisable blocks for benchmarks, in CPU or CUDA memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_fleet.fabric.contract import KVPool, Region
from vllm_fleet.fabric.plan import BlockShape

BLOCK_BYTES = 32 << 10
REGIONS = 32
"""As a model of 32 layers has."""


@dataclass(frozen=True)
class Blocks:
    """A pool of REGIONS regions in one allocation, and the allocation: bytes, NumPy array or CUDA tensor."""

    pool: KVPool
    memory: Any

    @property
    def shapes(self) -> list[BlockShape]:
        """How each region is cut."""
        return [BlockShape(r.block_bytes, r.block_stride, r.blocks) for r in self.pool.regions]


def blocks_in_region(nbytes: int) -> int:
    """Blocks of each region of a pool of ``nbytes`` bytes."""
    return max(1, nbytes // (REGIONS * BLOCK_BYTES))


def make_blocks(nbytes: int, cuda: int | None, *, filled: bool) -> Blocks:
    """A pool of ``nbytes`` bytes: zeros, or (``filled``) noise with each block's own number at its start."""
    each = blocks_in_region(nbytes)
    count = each * REGIONS
    memory: Any = np.zeros((count, BLOCK_BYTES), np.uint8) if cuda is None else _cuda_zeros(count, cuda)
    if filled:
        noise = np.random.default_rng(1).integers(0, 256, (min(count, 512), BLOCK_BYTES), np.uint8)
        for start in range(0, count, len(noise)):
            part = noise[: count - start].copy()
            part[:, :8] = np.arange(start, start + len(part), dtype="<u8").view(np.uint8).reshape(-1, 8)
            _store(memory, start, part, cuda)
    else:  # touch every page, so that no round pays for the kernel's first look at it
        memory[:] = 0
    base = int(memory.ctypes.data) if cuda is None else int(memory.data_ptr())
    size = each * BLOCK_BYTES
    regions = tuple(Region(base + i * size, size, BLOCK_BYTES, BLOCK_BYTES, each) for i in range(REGIONS))
    return Blocks(KVPool(regions, owner=memory, cuda=cuda), memory)


def scattered(nbytes: int, total: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Source and target blocks, the same in each region, that make up ``nbytes`` of a pool of ``total`` bytes."""
    rng = np.random.default_rng(seed)
    each, wanted = blocks_in_region(total), blocks_in_region(nbytes)
    return rng.permutation(each)[:wanted].astype(np.int64), rng.permutation(each)[:wanted].astype(np.int64)


def _cuda_zeros(count: int, cuda: int) -> Any:
    import torch

    return torch.zeros((count, BLOCK_BYTES), dtype=torch.uint8, device=f"cuda:{cuda}")


def _store(memory: Any, start: int, part: NDArray[np.uint8], cuda: int | None) -> None:
    if cuda is None:
        memory[start : start + len(part)] = part
        return
    import torch

    memory[start : start + len(part)] = torch.from_numpy(part).to(memory.device)
