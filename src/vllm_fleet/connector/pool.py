"""The KV cache of a worker, as memory that the fabric moves."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vllm_fleet.core.errors import BadRequest, ConfigError
from vllm_fleet.fabric.contract import KVPool, Region


def cache_pool(caches: Mapping[str, torch.Tensor], blocks: int) -> KVPool:
    """One region per distinct KV tensor, in the order of layers.

    Shapes are [blocks, ...] in vLLM 0.26 and 0.32 (v1/kv_cache_interface.py); memory order differs, so strides decide.

    Raises:
        ConfigError: in memory of a kind that no transport moves.
        BadRequest: a block's bytes are not contiguous, or a backend split the blocks.
    """
    regions: dict[int, Region] = {}
    devices = {cache.device for cache in caches.values()}
    if len(devices) != 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        raise ConfigError(f"the KV cache is on {sorted(map(str, devices))}; it can be moved in CPU or one GPU's memory")
    device = next(iter(devices))
    for name, cache in caches.items():
        if cache.shape[0] != blocks:
            raise BadRequest(f"layer {name} has {cache.shape[0]} kernel blocks for {blocks} blocks; not supported")
        item = cache.element_size()
        block_bytes = cache[0].numel() * item
        extent = 1 + sum((size - 1) * stride for size, stride in zip(cache.shape[1:], cache.stride()[1:], strict=True))
        if extent * item != block_bytes:
            raise BadRequest(f"layer {name} does not keep a block's bytes together; set VLLM_KV_CACHE_LAYOUT=HND")
        stride = cache.stride(0) * item
        nbytes = (blocks - 1) * stride + block_bytes
        regions.setdefault(cache.data_ptr(), Region(cache.data_ptr(), nbytes, block_bytes, stride, blocks))
    cuda = (
        (device.index if device.index is not None else torch.cuda.current_device()) if device.type == "cuda" else None
    )
    return KVPool(tuple(regions.values()), owner=list(caches.values()), cuda=cuda)
