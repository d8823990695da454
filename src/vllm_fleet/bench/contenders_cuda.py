"""The ceiling of GPU memory: one contiguous copy from the peer's GPU. Imports torch when used."""

from __future__ import annotations

import time
from typing import Any

from vllm_fleet.bench.blocks import BLOCK_BYTES, REGIONS
from vllm_fleet.bench.contenders import Case, NoChecks
from vllm_fleet.fabric.plan import Ints


class PeerCopy(NoChecks):
    """cudaMemcpyPeerAsync of as many contiguous bytes, from one GPU to the other, inside this process."""

    name, kind = "contiguous peer copy", "ceiling"

    def __init__(self, nbytes: int, cuda: tuple[int, int]) -> None:
        import torch

        self.bytes_max = nbytes
        self._torch: Any = torch
        self._target = torch.zeros(nbytes, dtype=torch.uint8, device=f"cuda:{cuda[0]}")
        self._source = torch.ones(nbytes, dtype=torch.uint8, device=f"cuda:{cuda[1]}")
        self._device = cuda[0]
        self._nbytes = 0

    def prepare(self, source: Ints, target: Ints, case: Case) -> None:
        self._nbytes = len(source) * REGIONS * BLOCK_BYTES
        self.copy()

    def copy(self) -> float:
        total, began = self._nbytes, time.perf_counter()
        self._target[:total].copy_(self._source[:total], non_blocking=True)
        self._torch.cuda.synchronize(self._device)
        return time.perf_counter() - began

    def close(self) -> None:
        self._source = self._target = None
