"""What differs between a host with two GPUs and a machine without one, for benchmarks/gpu_serving.py: one table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

GIB = 1 << 30
GRAPHS = {
    "mode": 0,
    "cudagraph_mode": "FULL_DECODE_ONLY",
    "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128],
}
"""CUDA graphs for decode steps without torch.compile, which would cost six instances that start at once minutes."""


@dataclass(frozen=True)
class Device:
    """Everything else is the same for both."""

    gpus: tuple[str, ...]
    """CUDA_VISIBLE_DEVICES of prefill and plain-0, and of decode and plain-1; empty: there are none to share out."""
    args: tuple[str, ...]
    """vLLM arguments of every instance."""
    graphs: tuple[str, ...]
    """Further ones, unless --eager was given."""
    kv_gib: Mapping[str, int]
    """Size of the KV cache by kind of instance (fleet, nixl, plain); 0: vLLM's own choice."""
    env: Mapping[str, str]
    nixl: Mapping[str, str]
    """Further keys of NixlConnector's configuration."""
    transports: tuple[str, ...]
    kinds: tuple[str, ...]
    """What is started: fleet (our prefill and decode), nixl (the same with NixlConnector), plain-0, plain-1."""
    block: int
    """Tokens in one block of KV."""
    handoff_tokens: tuple[int, ...]
    ttft_tokens: tuple[int, ...]
    batch: int
    """Streams in the running decode batch."""
    batch_tokens: int
    """Tokens of each of its prompts."""
    batch_handoff_tokens: int
    batch_every_s: float
    """Time between two handoffs that disturb the batch."""
    loads: tuple[str, ...]
    """KIND@RATE, see serving_loads.py."""
    shrink: int
    """Prompts and answers of the loads are this many times shorter."""


_ENV = {
    "PYTHONUNBUFFERED": "1",
    "PYTHONHASHSEED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}

DEVICES: Mapping[str, Device] = {
    "cuda": Device(
        gpus=("0", "1"),
        # 0.2 is what must be free when one of three instances starts on a GPU; it does not size the KV cache, as
        # kv_gib is given outright: instances that start at once would take each other's memory for their own.
        # 2048: an 8k prompt is computed in four chunks, of which a streamed handoff moves three while it goes on.
        args=("--load-format", "dummy", "--max-model-len", "33024", "--gpu-memory-utilization", "0.2",
              "--max-num-batched-tokens", "2048", "--max-num-seqs", "128"),
        graphs=("--compilation-config", json.dumps(GRAPHS)),
        kv_gib={"fleet": 28, "plain": 28, "nixl": 6},
        env=_ENV | {"VLLM_USE_FLASHINFER_SAMPLER": "0", "NCCL_NVLS_ENABLE": "0",
                    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"},
        nixl={},
        transports=("cuda_ipc", "tcp"),
        kinds=("fleet", "nixl", "plain-0", "plain-1"),
        block=16,
        handoff_tokens=(1024, 2048, 4096, 8192),
        ttft_tokens=(8192, 32768),
        batch=16,
        batch_tokens=256,
        batch_handoff_tokens=8192,
        batch_every_s=0.3,
        loads=("mixed@4", "long@4", "mixed@8", "mixed@12", "long@8"),
        shrink=1,
    ),
    "cpu": Device(
        gpus=(),
        args=("--max-model-len", "8192", "--max-num-batched-tokens", "512", "--max-num-seqs", "32"),
        graphs=("--enforce-eager",),
        kv_gib={"fleet": 0, "plain": 0, "nixl": 0},
        env=_ENV | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"},
        nixl={"kv_buffer_device": "cpu"},
        transports=("auto",),
        kinds=("fleet", "plain-0"),
        block=128,
        handoff_tokens=(512, 1024),
        ttft_tokens=(1024, 2048),
        batch=4,
        batch_tokens=64,
        batch_handoff_tokens=1024,
        batch_every_s=0.7,
        loads=("mixed@1", "long@0.5"),
        shrink=8,
    ),
}  # fmt: skip
