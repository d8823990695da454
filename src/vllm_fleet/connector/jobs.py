"""The jobs the scheduler side gives the workers: small, plain values."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_fleet.wire.ticket import WorkerAddress


@dataclass(frozen=True)
class HoldJob:
    """Prefill: hold a finished request's blocks for a transfer."""

    transfer: str
    request: str
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class LoadJob:
    """Decode: load a prompt's KV. ``blocks`` are ours; they take the peer's blocks from index ``skip`` on."""

    transfer: str
    request: str
    workers: tuple[WorkerAddress, ...]
    engine: str
    blocks: tuple[int, ...]
    skip: int


@dataclass(frozen=True)
class ReleaseJob:
    """Decode: give a transfer up that will not be loaded."""

    transfer: str
    workers: tuple[WorkerAddress, ...]
