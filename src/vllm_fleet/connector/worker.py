"""The connector's worker side: registers the KV memory, holds and loads blocks, reports what ended. One per rank."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

import torch

from vllm_fleet.config.connector import ConnectorSettings
from vllm_fleet.connector.dial import Self
from vllm_fleet.connector.holder import Holder
from vllm_fleet.connector.intake import Ended
from vllm_fleet.connector.loader import Loader
from vllm_fleet.connector.meta import StepMetadata, WorkerHandshake
from vllm_fleet.connector.pool import cache_pool
from vllm_fleet.connector.publisher import Publisher
from vllm_fleet.connector.split import Ranks, split_load, unread_ranks
from vllm_fleet.connector.stats import FleetStats
from vllm_fleet.connector.traces import Traces
from vllm_fleet.core.errors import BadRequest
from vllm_fleet.fabric import integrity
from vllm_fleet.fabric.contract import Transport
from vllm_fleet.fabric.endpoint import Endpoint
from vllm_fleet.fabric.faults import rehearsal
from vllm_fleet.fabric.select import LinkSelector, register_all
from vllm_fleet.net import sockets
from vllm_fleet.net.channel import Channel, Credentials
from vllm_fleet.wire import fabric as wire

IDLE_WAIT_S = 0.002
"""How long a step that computes nothing waits for a peer before it returns: the engine would spin otherwise."""


class WorkerSide:
    """One rank's holds and loads."""

    def __init__(
        self, settings: ConnectorSettings, credentials: Credentials, *, engine: str, rank: int, ranks: Ranks
    ) -> None:
        self._engine, self._rank, self._ranks = engine, rank, ranks
        self._changed = threading.Condition()
        listener = sockets.listen(settings.host, 0, setting="fabric.host")
        self._endpoint = Endpoint(listener, credentials)
        self._holder = Holder(self._endpoint, self._changed, lease_s=settings.lease_s, hold_s=settings.hold_s)
        self._publisher: Publisher | None = None
        self._endpoint.allow_read = self._holder.grants
        self._transports: dict[str, Transport] = {}
        self._settings = settings
        self._credentials = credentials
        self._loader: Loader | None = None
        self._invalid: set[int] = set()
        self._stats = FleetStats()
        self._traces = Traces()
        self._last_pins = 0

    # Start-up -------------------------------------------------------------------------------------------------------

    def register(self, caches: Mapping[str, torch.Tensor], blocks: int, layout: Mapping[str, str]) -> None:
        """Take the KV cache of every layer: tensors of shape [blocks, ...] whose blocks are contiguous.

        Raises:
            ConfigError: the memory is of a kind no transport here can move.
        """
        pool = cache_pool(caches, blocks)
        layout = {**layout, "regions": str(len(pool.regions))}
        self._block_bytes = {region.block_bytes for region in pool.regions}
        self._holder.use_pool(pool)
        self._publisher = Publisher(self._holder, pool.cuda)
        integrity.serve(self._endpoint)
        asked_for = self._settings.faults
        faults = None if asked_for is None else rehearsal(asked_for)
        self._transports, handles = register_all(self._settings.transports, self._endpoint, pool, faults)
        shapes = tuple(wire.Shape(r.block_bytes, r.block_stride, r.blocks) for r in pool.regions)
        description = wire.Description(self._engine, self._rank, self._ranks.ranks, layout, shapes, handles)
        selector = LinkSelector(self._transports)
        own = Self(self._credentials, selector, pool, layout, self._settings.checksums)
        self._loader = Loader(own, self._changed, load_s=self._settings.load_s, prefill_s=self._settings.prefill_s)

        def describe(channel: Channel, question: wire.Question) -> wire.Answer:
            return description

        self._endpoint.handle(wire.Describe, describe)
        self._endpoint.handle(wire.Trace, self._traces.answer)
        self._endpoint.start()

    def handshake(self) -> WorkerHandshake:
        """Where peers reach this rank."""
        return WorkerHandshake(self._endpoint.host, self._endpoint.port)

    # Every step -----------------------------------------------------------------------------------------------------

    def start(self, step: StepMetadata) -> None:
        """Start the step's jobs; before the forward pass, so that peers and copies need not wait for it."""
        self._holder.begin(step.grows, step.revoked, step.holds)
        self._traces.begin(step.grows, step.holds, step.loads, time.monotonic())
        loader = self._loader
        if loader is None:
            return
        for request in step.cancels:
            loader.cancel(request)
        for release in step.releases:
            for address in release.workers[self._rank :: self._ranks.ranks]:
                loader.release(release.transfer, address)
        for job in step.loads:
            try:
                loader.load(split_load(job, self._ranks, self._rank, self._block_bytes))
            except BadRequest as error:
                loader.fail(job.request, job.blocks, str(error))
                for address in job.workers[self._rank :: self._ranks.ranks]:
                    loader.release(job.transfer, address)
                continue
            for rank in unread_ranks(self._ranks, len(job.workers)) if self._rank == 0 else ():
                loader.release(job.transfer, job.workers[rank])

    def finish(self, step: StepMetadata) -> tuple[set[str], set[str]]:
        """Requests whose hold ended, and requests whose load ended; each once."""
        loader = self._loader
        if loader is None:
            return set(), set()
        if step.grows and self._publisher is not None:
            self._publisher.after_step(step.grows)
            self._traces.published(step.grows, time.monotonic())
        if step.idle:
            self._wait(loader)
        received: set[str] = set()
        for parts in loader.take_ended():
            received.add(parts[0].request)
            self._record(parts)
            self._traces.loaded(parts, time.monotonic())
        released = self._holder.take_ended()
        if released:
            self._traces.released(released, time.monotonic())
        return released, received

    def take_invalid(self) -> set[int]:
        """Our block ids that hold no valid KV, of loads that finish() has reported."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def take_stats(self) -> FleetStats | None:
        """What happened since the last call; None when nothing did."""
        pins = self._holder.pins
        if pins != self._last_pins:
            self._stats.data["pins"] = {str(self._rank): [pins, self._holder.blocks]}
            self._last_pins = pins
        self._stats.data["expired"] += self._holder.take_expired()
        if self._stats.is_empty():
            return None
        stats, self._stats = self._stats, FleetStats()
        return stats

    def close(self) -> None:
        """Stop listening, end every link and thread."""
        if self._publisher is not None:
            self._publisher.close()
        if self._loader is not None:
            self._loader.close()
        for transport in self._transports.values():
            transport.close()
        self._endpoint.close()

    def _record(self, parts: list[Ended]) -> None:
        failed = [part for part in parts if part.error is not None]
        self._invalid.update(block for part in failed for block in part.blocks)
        reasons = {part.reason for part in failed}
        if "cancelled" in reasons and len(reasons) > 1:
            reasons.discard("cancelled")  # abandoned because another part failed
        for reason in reasons - {"cancelled"}:
            self._stats.failed(reason)
        if not failed and self._rank == 0:
            self._stats.loaded(parts, self._ranks.ranks)

    def _wait(self, loader: Loader) -> None:
        with self._changed:
            if not loader.has_ended and not self._holder.has_ended:
                self._changed.wait(IDLE_WAIT_S)
