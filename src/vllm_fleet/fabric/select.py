"""Link selection: the first transport that probes well, and why the better ones were passed over."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_fleet.core import limits, log
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import ConfigError, LinkError
from vllm_fleet.fabric import transports as registry
from vllm_fleet.fabric.contract import KVPool, Link, Transport
from vllm_fleet.fabric.endpoint import Endpoint
from vllm_fleet.fabric.faults import Script
from vllm_fleet.fabric.transports.faulty import faulty
from vllm_fleet.wire.fabric import PoolHandle

AUTO = "auto"

PROBE_S = 3.0
"""One transport may take so long to connect; a better one that stalls leaves time for the next."""

REMEMBER_S = 60.0
"""A transport that could not reach a peer is not tried again for so long; a peer that registers again is."""


def auto_order(*, cuda: bool, rdma: bool) -> tuple[str, ...]:
    """The transports that ``auto`` stands for, best first, for a pool in CUDA or CPU memory, with RDMA devices or not.

    GPU peers and processes of one host first, then RDMA, then NCCL between GPUs of two hosts, then TCP.
    """
    near = ("cuda_ipc",) if cuda else ("cma",)
    far = ("nixl", "mooncake") if rdma else ()
    return (*near, *far, "nccl", "tcp") if cuda else (*near, *far, "tcp")


def has_rdma() -> bool:
    """Whether this machine has an RDMA device."""
    devices = Path("/sys/class/infiniband")
    return devices.is_dir() and any(devices.iterdir())


def register_all(
    names: Sequence[str], endpoint: Endpoint, pool: KVPool, faults: Script | None = None
) -> tuple[dict[str, Transport], tuple[PoolHandle, ...]]:
    """Register a pool with each transport named, best first, before the endpoint starts; "auto" is auto_order().

    With ``faults`` each transport is a faulty one, for rehearsals.

    Raises:
        ConfigError: a transport that was named cannot be had here, or not one of "auto" can.
    """
    automatic = AUTO in names
    wanted = auto_order(cuda=pool.cuda is not None, rdma=has_rdma()) if automatic else tuple(names)
    made: dict[str, Transport] = {}
    handles: list[PoolHandle] = []
    for name in wanted:
        try:
            factory = registry.load(name)
            transport = (factory if faults is None else faulty(factory, faults))(endpoint)
            handles.append(transport.register(pool))
        except (ConfigError, LinkError) as error:
            if not automatic:
                raise ConfigError(f"fabric.transports: {name} cannot be used here: {error}") from error
            log.event("transport.skipped", transport=name, reason=str(error))
            continue
        made[name] = transport
    if not made:
        raise ConfigError("fabric.transports: none can be used here; the log says why (transport.skipped)")
    return made, tuple(handles)


@dataclass(frozen=True)
class Chosen:
    """A link, and the peer's handle that it was made from."""

    link: Link
    handle: PoolHandle


class LinkSelector:
    """Chooses a link per peer, and remembers for a while which transports cannot reach whom. One thread per peer."""

    def __init__(self, transports: Mapping[str, Transport], clock: Callable[[], float] = time.monotonic) -> None:
        self._transports = transports
        self._clock = clock
        self._refused: dict[str, tuple[float, str]] = {}
        """By registration id of the peer's handle: until when, and why."""

    def choose(self, handles: Sequence[PoolHandle], peer: str, deadline: Deadline) -> Chosen:
        """The best working link to a peer: our transports in our order of preference, where the peer offers them.

        Raises:
            LinkError: none works; the message holds each one's reason.
        """
        offered = {handle.transport: handle for handle in handles}
        passed_over: dict[str, str] = {}
        for name, transport in self._transports.items():
            handle = offered.get(name)
            if handle is None:
                passed_over[name] = "the peer does not offer it"
                continue
            until, reason = self._refused.get(handle.pool, (0.0, ""))
            if self._clock() < until:
                passed_over[name] = f"{reason} (tried less than {REMEMBER_S:.0f} s ago)"
                continue
            try:
                link = transport.connect(handle, deadline.capped(PROBE_S))
            except LinkError as error:
                passed_over[name] = str(error)
                self._remember(handle.pool, str(error))
                continue
            log.event("link.chosen", peer=peer, transport=name, passed_over=passed_over)
            return Chosen(link, handle)
        for handle in handles:  # with nothing left to fall back to, the next attempt tries them all again
            self._refused.pop(handle.pool, None)
        reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
        raise LinkError(f"no link to {peer}: {reasons or 'no transport is allowed'}")

    def _remember(self, pool: str, reason: str) -> None:
        while len(self._refused) >= limits.PEERS_MAX:
            self._refused.pop(next(iter(self._refused)), None)
        self._refused[pool] = (self._clock() + REMEMBER_S, reason)
