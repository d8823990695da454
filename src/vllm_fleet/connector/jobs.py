"""The jobs the scheduler side gives the workers: small, plain values."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_fleet.wire.ticket import WorkerAddress


@dataclass(frozen=True)
class GrowJob:
    """Prefill: a running request's further blocks, and how many of its tokens have KV once this step has run."""

    transfer: str
    request: str
    prompt: bytes
    blocks: tuple[int, ...]
    ready: int
    queued_s: float = 0.0
    """From the request's arrival until now."""


@dataclass(frozen=True)
class HoldJob:
    """Prefill: hold a finished request's blocks for a transfer."""

    transfer: str
    request: str
    prompt: bytes
    blocks: tuple[int, ...]
    tokens: int


@dataclass(frozen=True)
class LoadJob:
    """Decode: load a prompt's KV. ``blocks`` are ours; they take the peer's blocks from index ``skip`` on."""

    transfer: str
    request: str
    workers: tuple[WorkerAddress, ...]
    engine: str
    prompt: bytes
    tokens: int
    """Tokens of the prompt whose KV is wanted; the blocks cover them, the last one perhaps in part."""
    blocks: tuple[int, ...]
    skip: int
    streamed: bool
    """Whether prefill computes it now; else it has finished."""
    queued_s: float = 0.0
    """From the request's arrival until now."""


@dataclass(frozen=True)
class ReleaseJob:
    """Decode: give a transfer up that will not be loaded."""

    transfer: str
    workers: tuple[WorkerAddress, ...]
