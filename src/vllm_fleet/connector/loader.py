"""Decode's half of a worker: loads KV from prefill workers, in a thread per peer."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vllm_fleet.core import limits, log
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import FleetError, LinkError, PeerGone
from vllm_fleet.fabric.contract import Link, Transfer, TransferError, Transport
from vllm_fleet.fabric.endpoint import ask
from vllm_fleet.fabric.plan import BlockShape, plan_blocks
from vllm_fleet.fabric.select import choose_link
from vllm_fleet.net.channel import Channel, Credentials, connect
from vllm_fleet.wire import fabric as wire
from vllm_fleet.wire.ticket import WorkerAddress

LOAD_SETTING = "handoff.load_s"
RELEASE_S = 2.0


@dataclass(frozen=True)
class Self:
    """What a worker needs to know about itself to load from others."""

    credentials: Credentials
    transports: Mapping[str, Transport]
    shapes: tuple[BlockShape, ...]
    layout: Mapping[str, str]


@dataclass(frozen=True)
class PeerLoad:
    """One load from one prefill worker."""

    request: str
    transfer: str
    engine: str
    blocks: tuple[int, ...]
    skip: int


@dataclass(frozen=True)
class Ended:
    """How a load ended: ``error`` is None when every byte arrived and was held all the time."""

    load: PeerLoad
    error: str | None
    reason: str
    transport: str
    nbytes: int
    copy_s: float
    whole_s: float


class _Job:
    def __init__(self, load: PeerLoad | None, transfer: str) -> None:
        self.load = load
        self.transfer = transfer
        self.cancelled = threading.Event()
        self.running: Transfer | None = None

    def cancel(self) -> None:
        """Abandon it; what runs is told to stop."""
        self.cancelled.set()
        running = self.running
        if running is not None:
            running.cancel()


class Peer:
    """One prefill worker: its connection, link and the thread that loads from it."""

    def __init__(self, address: WorkerAddress, own: Self, ended: Callable[[Ended], None], load_s: float) -> None:
        self._address = address
        self._own = own
        self._ended = ended
        self._load_s = load_s
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._channel: Channel | None = None
        self._link: Link | None = None
        self._engine = ""
        self._thread = threading.Thread(target=self._work, name=f"fleet-load-{address.port}", daemon=True)
        self._thread.start()

    def load(self, load: PeerLoad) -> _Job:
        """Queue a load; its end is reported once, whatever happens."""
        job = _Job(load, load.transfer)
        self._queue.put(job)
        return job

    def release(self, transfer: str) -> None:
        """Queue giving up a transfer; best effort, since its lease ends in any case."""
        self._queue.put(_Job(None, transfer))

    def close(self) -> None:
        """Stop the thread; the connection ends and with it every pin it had open."""
        self._queue.put(None)
        channel = self._channel
        if channel is not None:
            channel.close()

    def _work(self) -> None:
        try:
            while (job := self._queue.get()) is not None:
                if job.load is None:
                    self._release(job.transfer)
                else:
                    self._ended(self._load(job, job.load))
        finally:
            self._disconnect()

    def _release(self, transfer: str) -> None:
        deadline = Deadline.after(RELEASE_S, "connector.loader.RELEASE_S")
        try:
            ask(self._connected(deadline, need_link=False), wire.Close(transfer, taken=False), deadline)
        except FleetError as error:
            log.event("link.lost", peer=self._name, reason=str(error))
            self._disconnect()

    def _load(self, job: _Job, load: PeerLoad) -> Ended:
        began = time.monotonic()
        try:
            return self._try_load(job, load, began)
        except Exception as error:  # noqa: BLE001 - the thread's outermost loop: a request must never wait for ever
            log.warn("handoff.failed", request=load.request, peer=self._name, reason=repr(error))
            self._disconnect()
            return Ended(load, repr(error), "Bug", "none", 0, 0.0, time.monotonic() - began)

    def _try_load(self, job: _Job, load: PeerLoad, began: float) -> Ended:
        deadline = Deadline.after(self._load_s, LOAD_SETTING)
        nbytes, copy_s = 0, 0.0
        error, reason = None, ""
        try:
            if job.cancelled.is_set():
                raise TransferError("the request was cancelled")
            nbytes, copy_s = self._copy(job, load, deadline)
        except FleetError as failure:
            error, reason = str(failure), type(failure).__name__
            if job.cancelled.is_set():
                reason = "cancelled"
            else:
                log.warn("handoff.failed", request=load.request, peer=self._name, reason=error)
            self._after_failure(load.transfer)
        transport = self._link.transport if self._link is not None else "none"
        return Ended(load, error, reason, transport, nbytes, copy_s, time.monotonic() - began)

    def _copy(self, job: _Job, load: PeerLoad, deadline: Deadline) -> tuple[int, float]:
        channel = self._connected(deadline, need_link=True, engine=load.engine)
        opened = ask(channel, wire.Open(load.transfer), deadline)
        if not isinstance(opened, wire.Opened):
            reason = opened.reason if isinstance(opened, wire.Denied) else type(opened).__name__
            raise TransferError(f"{self._name} does not hold the transfer: {reason}")
        sources = opened.blocks[load.skip :]
        if len(sources) < len(load.blocks):
            raise TransferError(
                f"{self._name} holds {len(opened.blocks)} blocks, {len(load.blocks)} + {load.skip} asked"
            )
        plan = plan_blocks(self._own.shapes, sources[: len(load.blocks)], load.blocks, load.transfer)
        assert self._link is not None
        began = time.monotonic()
        job.running = self._link.read(plan)
        if job.cancelled.is_set():
            job.running.cancel()
        job.running.wait(deadline)
        copy_s = time.monotonic() - began
        closed = ask(channel, wire.Close(load.transfer, taken=True), deadline)
        if not isinstance(closed, wire.Closed) or not closed.valid:
            raise TransferError(f"{self._name} did not hold the blocks until they were read")
        return plan.total_bytes, copy_s

    def _after_failure(self, transfer: str) -> None:
        """Tell the peer, if it still listens, that the transfer is over; else forget the connection."""
        channel = self._channel
        if channel is None:
            return
        deadline = Deadline.after(RELEASE_S, "connector.loader.RELEASE_S")
        try:
            ask(channel, wire.Close(transfer, taken=False), deadline)
        except FleetError:
            self._disconnect()

    def _connected(self, deadline: Deadline, *, need_link: bool, engine: str = "") -> Channel:
        """The connection, made again when it broke or the peer has restarted since."""
        kept = self._channel
        same_engine = not engine or engine == self._engine
        linked = self._link is not None or not need_link
        if kept is not None and same_engine and linked and self._alive(kept, deadline):
            return kept
        self._disconnect()
        channel = connect(self._address.host, self._address.port, self._own.credentials, deadline)
        self._channel = channel
        described = ask(channel, wire.Describe(), deadline)
        if not isinstance(described, wire.Description):
            raise LinkError(f"{self._name} does not describe itself")
        if engine and described.engine != engine:
            raise PeerGone(f"{self._name} is engine {described.engine} now; the ticket is of {engine}")
        self._engine = described.engine
        if need_link:
            check_layout(self._own.layout, described.layout, self._name)
            self._link = choose_link(self._own.transports, described.handles, self._name, deadline)
        return channel

    def _alive(self, channel: Channel, deadline: Deadline) -> bool:
        try:
            return isinstance(ask(channel, wire.Ping(), deadline), wire.Pong)
        except FleetError:
            return False

    def _disconnect(self) -> None:
        link, self._link = self._link, None
        channel, self._channel = self._channel, None
        if link is not None:
            link.close()
        if channel is not None:
            channel.close()

    @property
    def _name(self) -> str:
        return f"{self._address.host}:{self._address.port}"


def check_layout(own: Mapping[str, str], theirs: Mapping[str, str], peer: str) -> None:
    """LinkError naming every value in which two workers' KV differ."""
    keys = sorted(own.keys() | theirs.keys())
    differing = [f"{k}: {own.get(k)!r} here, {theirs.get(k)!r} there" for k in keys if own.get(k) != theirs.get(k)]
    if differing:
        raise LinkError(f"{peer} keeps its KV differently ({'; '.join(differing)})")


class Loader:
    """All peers of one decode worker, and the ended loads that the engine has not taken yet."""

    def __init__(self, own: Self, changed: threading.Condition, *, load_s: float) -> None:
        self._own = own
        self._changed = changed
        self._load_s = load_s
        self._peers: dict[WorkerAddress, Peer] = {}
        self._jobs: dict[str, _Job] = {}
        self._results: list[Ended] = []

    def load(self, load: PeerLoad, address: WorkerAddress) -> None:
        """Start a load; it ends in one Ended."""
        self._jobs[load.request] = self._peer(address).load(load)

    def release(self, transfer: str, address: WorkerAddress) -> None:
        """Give a transfer up."""
        self._peer(address).release(transfer)

    def cancel(self, request: str) -> None:
        """Abandon a request's load; it still ends in one Ended, once nothing writes any more."""
        job = self._jobs.get(request)
        if job is not None:
            job.cancel()

    def fail(self, load: PeerLoad, error: str, reason: str) -> None:
        """A load that cannot even be started."""
        self._report(Ended(load, error, reason, "none", 0, 0.0, 0.0))

    def take_ended(self) -> list[Ended]:
        """Loads that ended since the last call."""
        with self._changed:
            results, self._results = self._results, []
        for result in results:
            self._jobs.pop(result.load.request, None)
        return results

    @property
    def pending(self) -> int:
        """Loads started and not taken yet."""
        return len(self._jobs)

    @property
    def has_ended(self) -> bool:
        """Whether take_ended would return something; the condition must be held."""
        return bool(self._results)

    def close(self) -> None:
        """Stop every peer's thread."""
        for peer in self._peers.values():
            peer.close()

    def _peer(self, address: WorkerAddress) -> Peer:
        peer = self._peers.get(address)
        if peer is None:
            while len(self._peers) >= limits.PEERS_MAX:  # the oldest goes; its thread ends after its queue
                self._peers.pop(next(iter(self._peers))).close()
            peer = self._peers[address] = Peer(address, self._own, self._report, self._load_s)
        return peer

    def _report(self, ended: Ended) -> None:
        with self._changed:
            self._results.append(ended)
            self._changed.notify_all()
