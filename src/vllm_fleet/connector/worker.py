"""The connector's worker side: registers the KV memory, holds and loads blocks, reports what ended. One per rank."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping

import torch

from vllm_fleet.config.connector import ConnectorSettings
from vllm_fleet.connector.holder import Holder
from vllm_fleet.connector.jobs import LoadJob
from vllm_fleet.connector.loader import Loader
from vllm_fleet.connector.meta import StepMetadata, WorkerHandshake
from vllm_fleet.connector.peer import Ended, PeerLoad, Self
from vllm_fleet.connector.stats import FleetStats
from vllm_fleet.core.errors import BadRequest, ConfigError
from vllm_fleet.fabric import integrity
from vllm_fleet.fabric.contract import KVPool, Region, Transport
from vllm_fleet.fabric.endpoint import Endpoint
from vllm_fleet.fabric.select import LinkSelector, register_all
from vllm_fleet.net import sockets
from vllm_fleet.net.channel import Channel, Credentials
from vllm_fleet.wire import fabric as wire

IDLE_WAIT_S = 0.002
"""How long a step that computes nothing waits for a peer before it returns: the engine would spin otherwise."""


class WorkerSide:
    """One rank's holds and loads."""

    def __init__(
        self, settings: ConnectorSettings, credentials: Credentials, *, engine: str, rank: int, ranks: int
    ) -> None:
        self._engine, self._rank, self._ranks = engine, rank, ranks
        self._changed = threading.Condition()
        listener = sockets.listen(settings.host, 0, setting="fabric.host")
        self._endpoint = Endpoint(listener, credentials)
        self._holder = Holder(self._endpoint, self._changed, lease_s=settings.lease_s, hold_s=settings.hold_s)
        self._endpoint.allow_read = self._holder.grants
        self._transports: dict[str, Transport] = {}
        self._settings = settings
        self._credentials = credentials
        self._loader: Loader | None = None
        self._invalid: set[int] = set()
        self._stats = FleetStats()
        self._last_pins = 0

    # Start-up -------------------------------------------------------------------------------------------------------

    def register(self, caches: Mapping[str, torch.Tensor], blocks: int, layout: Mapping[str, str]) -> None:
        """Take the KV cache of every layer: tensors of shape [blocks, ...] whose blocks are contiguous.

        Raises:
            ConfigError: the memory is of a kind no transport here can move.
        """
        pool = cache_pool(caches, blocks)
        regions = pool.regions
        layout = {
            **layout,
            "regions": str(len(regions)),
            "block_bytes": ",".join(sorted({str(region.block_bytes) for region in regions})),
            "block_stride": ",".join(sorted({str(region.block_stride) for region in regions})),
        }
        self._holder.use_pool(pool)
        integrity.serve(self._endpoint)
        self._transports, handles = register_all(self._settings.transports, self._endpoint, pool)
        description = wire.Description(self._engine, self._rank, self._ranks, layout, handles)
        selector = LinkSelector(self._transports)
        own = Self(self._credentials, selector, pool, layout, self._settings.checksums)
        self._loader = Loader(own, self._changed, load_s=self._settings.load_s)

        def describe(channel: Channel, question: wire.Question) -> wire.Answer:
            return description

        self._endpoint.handle(wire.Describe, describe)
        self._endpoint.start()

    def handshake(self) -> WorkerHandshake:
        """Where peers reach this rank."""
        return WorkerHandshake(self._endpoint.host, self._endpoint.port)

    # Every step -----------------------------------------------------------------------------------------------------

    def start(self, step: StepMetadata) -> None:
        """Start the step's jobs; before the forward pass, so that peers and copies need not wait for it."""
        self._holder.hold(step.holds)
        loader = self._loader
        if loader is None:
            return
        for request in step.cancels:
            loader.cancel(request)
        for release in step.releases:
            if self._rank < len(release.workers):
                loader.release(release.transfer, release.workers[self._rank])
        for job in step.loads:
            self._start_load(loader, job)

    def finish(self, step: StepMetadata) -> tuple[set[str], set[str]]:
        """Requests whose hold ended, and requests whose load ended; each once."""
        loader = self._loader
        if loader is None:
            return set(), set()
        if step.idle:
            self._wait(loader)
        received: set[str] = set()
        for ended in loader.take_ended():
            received.add(ended.load.request)
            self._record(ended)
        return self._holder.take_ended(), received

    def take_invalid(self) -> set[int]:
        """Our block ids that hold no valid KV, of loads that finish() has reported."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def take_stats(self) -> FleetStats | None:
        """What happened since the last call; None when nothing did."""
        pins = self._holder.pins
        if pins != self._last_pins:
            self._stats.data["pins"] = {str(self._rank): pins}
            self._last_pins = pins
        self._stats.data["expired"] += self._holder.take_expired()
        if self._stats.is_empty():
            return None
        stats, self._stats = self._stats, FleetStats()
        return stats

    def close(self) -> None:
        """Stop listening, end every link and thread."""
        if self._loader is not None:
            self._loader.close()
        for transport in self._transports.values():
            transport.close()
        self._endpoint.close()

    def _start_load(self, loader: Loader, job: LoadJob) -> None:
        load = PeerLoad(job.request, job.transfer, job.engine, job.blocks, job.skip)
        if len(job.workers) == self._ranks:
            loader.load(load, job.workers[self._rank])
            return
        error = f"prefill has {len(job.workers)} tensor-parallel ranks, this instance {self._ranks}"
        loader.fail(load, error, "BadRequest")

    def _record(self, ended: Ended) -> None:
        if ended.error is None:
            if self._rank == 0:
                load = [ended.transport, ended.nbytes * self._ranks, ended.copy_s, ended.whole_s]
                self._stats.data["loads"].append(load)
        elif ended.reason != "cancelled":
            self._invalid.update(ended.load.blocks)
            failures = Counter(self._stats.data["failures"])
            failures[ended.reason] += 1
            self._stats.data["failures"] = dict(failures)

    def _wait(self, loader: Loader) -> None:
        with self._changed:
            if not loader.has_ended and not self._holder.has_ended:
                self._changed.wait(IDLE_WAIT_S)


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
