"""The owner's half of nixl where a reader cannot pull: it writes into the reader's pool, when asked."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vllm_fleet.core.errors import Corrupt, FleetError, LinkError, PeerGone
from vllm_fleet.fabric.contract import TransferError
from vllm_fleet.fabric.control import IDLE_S
from vllm_fleet.fabric.endpoint import Endpoint
from vllm_fleet.fabric.owner import OwnedPool, Runs
from vllm_fleet.fabric.pacing import Pause
from vllm_fleet.fabric.transports.nixl_agent import Agent, Batch
from vllm_fleet.fabric.transports.nixl_handle import NixlDetails, decode
from vllm_fleet.net.channel import Channel
from vllm_fleet.wire import fabric as wire


@dataclass(frozen=True)
class _Reader:
    """Where one connection's reader wants its bytes."""

    agent: str
    details: NixlDetails
    region_bytes: tuple[int, ...]


class Pusher:
    """Serves the registered pool's agent: UCX's own requests, and pushes. Safe to use from several threads."""

    def __init__(self, endpoint: Endpoint, owned: OwnedPool) -> None:
        self._owned = owned
        self._changed = threading.Condition()
        self._agent: Agent | None = None
        self._users = 0
        self._readers: dict[Channel, _Reader] = {}
        endpoint.handle(wire.NixlJoin, self._join)
        endpoint.handle(wire.NixlPush, self._push)
        endpoint.on_lost(self._lost)

    def serve(self, agent: Agent) -> None:
        """Push with this agent from now on; after stop()."""
        with self._changed:
            self._agent = agent

    def stop(self) -> None:
        """End running pushes and the agent. Safe to call twice."""
        with self._changed:
            agent, self._agent = self._agent, None
            self._readers.clear()
            self._changed.wait_for(lambda: self._users == 0)  # bounded: pushes look whether their agent still serves
        if agent is not None:
            agent.destroy()

    @contextlib.contextmanager
    def _using(self) -> Iterator[Agent | None]:
        with self._changed:
            agent = self._agent
            self._users += 1
        try:
            yield agent
        finally:
            del agent
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    def _join(self, channel: Channel, question: wire.Question) -> wire.Answer:
        assert isinstance(question, wire.NixlJoin)
        self._lost(channel)
        with self._using() as agent:
            if agent is None or not self._owned.is_current(question.pool):
                return wire.Denied("stale_pool")
            try:
                details = decode(question.handle)
                name = agent.load(details.metadata)
            except LinkError as error:
                return wire.Denied("unsupported", str(error)[:200])
            with self._changed:
                taken = any(reader.agent == name for reader in self._readers.values())
                if not taken:
                    self._readers[channel] = _Reader(name, details, question.handle.region_bytes)
            if taken:
                return wire.Denied("unsupported", "another connection has joined with this agent")
            self._finish(agent, agent.start_nonce(name, details.landing_address, write=True), channel)
            return wire.Probed(question.pool)

    def _push(self, channel: Channel, question: wire.Question) -> wire.Answer:
        assert isinstance(question, wire.NixlPush)
        runs = self._owned.check(question.pool, question.grant, question.runs)
        if isinstance(runs, wire.Denied):
            return runs
        if len(question.targets) != 8 * len(runs.nbytes):
            raise Corrupt(f"{len(question.targets)} bytes of targets for {len(runs.nbytes)} runs")
        targets = np.frombuffer(question.targets, "<i8")
        with self._using() as agent:
            reader = self._readers.get(channel)
            if agent is None or reader is None:
                return wire.Denied("stale_pool")
            if not _inside(runs, targets, reader.region_bytes):
                return wire.Denied("out_of_range")
            theirs = np.array(reader.details.addresses, np.int64)[runs.region] + targets
            batch = agent.start(
                reader.agent, reader.details.device, write=True, own=runs.addresses, theirs=theirs, nbytes=runs.nbytes
            )
            self._finish(agent, batch, channel)
        return wire.Moved(runs.total_bytes) if self._owned.is_current(question.pool) else wire.Denied("stale_pool")

    def _finish(self, agent: Agent, batch: Batch, channel: Channel) -> None:
        """Wait for a push. Raises PeerGone when the reader has gone, or takes nothing for IDLE_S, or at stop()."""
        pause, until = Pause(), time.monotonic() + IDLE_S
        try:
            while not batch.done():
                if not pause():
                    continue
                if not channel.is_open():
                    raise PeerGone(f"{channel.peer} went away in the middle of a push")
                if self._agent is not agent:
                    raise TransferError("the pool was withdrawn in the middle of a push")
                if time.monotonic() >= until:
                    raise TransferError(f"{channel.peer} took nothing for {IDLE_S:.0f} s")
        except FleetError:
            self._lost(channel)
            raise
        finally:
            batch.release()

    def _lost(self, channel: Channel) -> None:
        with self._changed:
            reader = self._readers.pop(channel, None)
            agent = self._agent
            if reader is not None and agent is not None:
                agent.forget(reader.agent)


def _inside(runs: Runs, targets: np.ndarray, region_bytes: tuple[int, ...]) -> bool:
    """Whether all targets are inside the reader's regions."""
    sizes = np.array(region_bytes, np.int64)
    if int(runs.region.max()) >= len(sizes):
        return False
    return bool(((targets >= 0) & (targets <= sizes[runs.region] - runs.nbytes)).all())
