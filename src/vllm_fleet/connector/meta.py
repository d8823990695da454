"""What the connector's halves tell each other through vLLM, once per engine step."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata, KVConnectorMetadata

from vllm_fleet.connector.jobs import GrowJob, HoldJob, LoadJob, ReleaseJob


@dataclass
class StepMetadata(KVConnectorMetadata):
    """Scheduler to workers: the jobs of one step. Small, plain values only: vLLM serialises it for every worker."""

    grows: list[GrowJob] = field(default_factory=list)
    revoked: list[str] = field(default_factory=list)
    """Transfers whose running request has lost its blocks."""
    holds: list[HoldJob] = field(default_factory=list)
    loads: list[LoadJob] = field(default_factory=list)
    releases: list[ReleaseJob] = field(default_factory=list)
    cancels: list[str] = field(default_factory=list)
    """Requests whose load is to be abandoned; their blocks are freed once it has stopped."""
    idle: bool = False
    """Whether this step computes nothing: the worker may wait a moment for a peer instead of returning at once."""


@dataclass
class WorkerHandshake(KVConnectorHandshakeMetadata):
    """Worker to scheduler, once at start-up: where this worker takes fabric connections."""

    host: str
    port: int
