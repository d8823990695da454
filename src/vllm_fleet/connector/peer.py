"""One prefill worker, seen from decode: its connection, its link and the thread that loads KV from it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from vllm_fleet.core import log
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import FleetError, LinkError, PeerGone
from vllm_fleet.fabric.contract import KVPool, Transfer, TransferError
from vllm_fleet.fabric.endpoint import ask
from vllm_fleet.fabric.integrity import ChecksumError, Mode, Verifier
from vllm_fleet.fabric.plan import BlockCopyPlan, BlockShape, plan_blocks
from vllm_fleet.fabric.select import Chosen, LinkSelector
from vllm_fleet.net.channel import Channel, Credentials, connect
from vllm_fleet.wire import fabric as wire
from vllm_fleet.wire.ticket import WorkerAddress

LOAD_SETTING = "handoff.load_s"
RELEASE_S = 2.0


@dataclass(frozen=True)
class Self:
    """What a worker needs to know about itself to load from others."""

    credentials: Credentials
    selector: LinkSelector
    pool: KVPool
    layout: Mapping[str, str]
    checksums: Mode

    @property
    def shapes(self) -> tuple[BlockShape, ...]:
        """How each region is cut into blocks."""
        return tuple(BlockShape(r.block_bytes, r.block_stride, r.blocks) for r in self.pool.regions)


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


class Job:
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
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._channel: Channel | None = None
        self._chosen: Chosen | None = None
        self._verifier = Verifier(own.pool, own.checksums, np.random.default_rng())
        self._engine = ""
        self._thread = threading.Thread(target=self._work, name=f"fleet-load-{address.port}", daemon=True)
        self._thread.start()

    def load(self, load: PeerLoad) -> Job:
        """Queue a load; its end is reported once, whatever happens."""
        job = Job(load, load.transfer)
        self._queue.put(job)
        return job

    def release(self, transfer: str) -> None:
        """Queue giving up a transfer; best effort, since its lease ends in any case."""
        self._queue.put(Job(None, transfer))

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

    def _load(self, job: Job, load: PeerLoad) -> Ended:
        began = time.monotonic()
        try:
            return self._try_load(job, load, began)
        except Exception as error:  # noqa: BLE001 - the thread's outermost loop: a request must never wait for ever
            log.warn("handoff.failed", request=load.request, peer=self._name, reason=repr(error))
            self._disconnect()
            return Ended(load, repr(error), "Bug", "none", 0, 0.0, time.monotonic() - began)

    def _try_load(self, job: Job, load: PeerLoad, began: float) -> Ended:
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
        transport = self._chosen.link.transport if self._chosen is not None else "none"
        return Ended(load, error, reason, transport, nbytes, copy_s, time.monotonic() - began)

    def _copy(self, job: Job, load: PeerLoad, deadline: Deadline) -> tuple[int, float]:
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
        copy_s = self._read(job, plan, channel, deadline)
        closed = ask(channel, wire.Close(load.transfer, taken=True), deadline)
        if not isinstance(closed, wire.Closed) or not closed.valid:
            raise TransferError(f"{self._name} did not hold the blocks until they were read")
        return plan.total_bytes, copy_s

    def _read(self, job: Job, plan: BlockCopyPlan, channel: Channel, deadline: Deadline) -> float:
        """Copy a plan and compare what is to be compared; the seconds it took."""
        assert self._chosen is not None
        began = time.monotonic()
        try:
            with self._verifier.checking(channel, self._chosen.handle.pool, plan, deadline):
                job.running = self._chosen.link.read(plan)
                if job.cancelled.is_set():
                    job.running.cancel()
                job.running.wait(deadline)
        except ChecksumError:
            self._drop_link()  # not trusted until it was made, and checked, anew
            raise
        return time.monotonic() - began

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
        linked = self._chosen is not None or not need_link
        if kept is not None and same_engine and linked and kept.is_open():
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
            self._chosen = self._own.selector.choose(described.handles, self._name, deadline)
            self._verifier = Verifier(self._own.pool, self._own.checksums, np.random.default_rng())
        return channel

    def _drop_link(self) -> None:
        chosen, self._chosen = self._chosen, None
        if chosen is not None:
            chosen.link.close()

    def _disconnect(self) -> None:
        self._drop_link()
        channel, self._channel = self._channel, None
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
