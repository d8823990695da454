"""CUDA memory for the conformance suite; see tests/contract/pools.py. Imports torch when used."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.contract.pools import REGIONS, Bytes
from vllm_fleet.fabric.contract import KVPool, Region

if TYPE_CHECKING:
    import torch

GAP_BYTES = 512  # between regions, which lie in one allocation as in vLLM's KV cache; never copied to


class CudaMemory:
    """Regions in one tensor on ``device``."""

    def __init__(self, blocks: int, block_bytes: int, device: int) -> None:
        import torch

        nbytes = blocks * block_bytes
        stride = -(-nbytes // GAP_BYTES) * GAP_BYTES + GAP_BYTES
        self._shape = (blocks, block_bytes)
        self._device = device
        self._tensor: torch.Tensor | None = torch.zeros(REGIONS * stride, dtype=torch.uint8, device=f"cuda:{device}")
        self._parts = [slice(region * stride, region * stride + nbytes) for region in range(REGIONS)]
        base = self._tensor.data_ptr()
        regions = tuple(Region(base + part.start, nbytes, block_bytes, block_bytes, blocks) for part in self._parts)
        self.pool = KVPool(regions, owner=self._tensor, cuda=device)
        self._wait()

    def fill(self, arrays: list[Bytes]) -> None:
        import torch

        for part, content in zip(self._parts, arrays, strict=True):
            self._here()[part].copy_(torch.from_numpy(content.reshape(-1)))
        self._wait()

    def read_back(self) -> list[Bytes]:
        self._wait()
        whole = self._here().cpu().numpy()
        gaps = np.ones(len(whole), bool)
        for part in self._parts:
            gaps[part] = False
        assert not whole[gaps].any(), "bytes between the regions were written"
        return [whole[part].reshape(self._shape).copy() for part in self._parts]

    def free(self) -> None:
        import torch

        self.pool = KVPool((), cuda=self._device)
        self._tensor = None
        torch.cuda.empty_cache()

    def _here(self) -> torch.Tensor:
        assert self._tensor is not None, "the memory was freed"
        return self._tensor

    def _wait(self) -> None:
        import torch

        torch.cuda.synchronize(self._device)


def make(blocks: int, block_bytes: int, device: int) -> CudaMemory:
    """Zeros on a device."""
    return CudaMemory(blocks, block_bytes, device)


def settle(device: int) -> None:
    """Let CUDA open the files and threads that it keeps for the life of the process, before a test counts them."""
    memory = make(4, 4096, device)
    memory.fill(memory.read_back())
