"""One prefill worker, seen from decode: its connections, its link and the thread that loads KV from it.

The thread carries out what its queue says: loads asked for, progress that the peer tells over a second connection
(a thread of its own receives it), transfers to give up. Several loads are under way at a time; each is copied as far
as it is ready, and closed when it is complete.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from vllm_fleet.connector.dial import Connection, Self, dial
from vllm_fleet.connector.inbox import Heard, Inbox, Item, Release
from vllm_fleet.connector.intake import Ended, Intake, Job, PeerLoad
from vllm_fleet.connector.split import plan_part
from vllm_fleet.core import log
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import Corrupt, DeadlineExceeded, FleetError, PeerGone
from vllm_fleet.fabric.contract import TransferError
from vllm_fleet.fabric.endpoint import ask
from vllm_fleet.fabric.integrity import ChecksumError
from vllm_fleet.wire import fabric as wire
from vllm_fleet.wire.ticket import WorkerAddress

LOAD_SETTING = "handoff.load_s"
PREFILL_SETTING = "handoff.prefill_s"
RELEASE_S = 2.0
BEGIN_S = 1.0
"""A prefill answer reaches decode before its worker hears that the blocks are held, by an engine step."""


class Peer:
    """One prefill worker. All but the queue belongs to its thread."""

    def __init__(
        self, address: WorkerAddress, own: Self, ended: Callable[[Ended], None], *, load_s: float, prefill_s: float
    ) -> None:
        self._address = address
        self._own = own
        self._ended = ended
        self._load_s, self._prefill_s = load_s, prefill_s
        self._inbox = Inbox()
        self._connection: Connection | None = None
        self._intakes: dict[str, Intake] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"fleet-load-{address.port}", daemon=True)
        self._thread.start()

    def load(self, load: PeerLoad) -> Job:
        """Queue a load; its end is reported once, whatever happens."""
        job = Job(load)
        self._inbox.put(job)
        return job

    def cancel(self, job: Job) -> None:
        """Abandon a load; it still ends in one Ended."""
        job.cancel()
        self._inbox.put(Release(job.load.transfer, job.load.reader))

    def release(self, transfer: str) -> None:
        """Queue giving up a transfer; best effort, since its lease ends in any case."""
        self._inbox.put(Release(transfer))

    def close(self) -> None:
        """Stop the thread; the connections end and with them every pin they had open."""
        self._closed = True
        self._inbox.wake()
        connection = self._connection
        if connection is not None:
            connection.abort()

    # The thread --------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while not self._closed:
                for item in self._inbox.take(min((i.deadline for i in self._intakes.values()), default=None)):
                    self._guard(item)
                for intake in list(self._intakes.values()):
                    self._guard(intake)
        finally:
            self._disconnect("this worker stops")
            for item in self._inbox.left():
                if isinstance(item, Job):
                    self._end(Intake(item, time.monotonic(), 0.0), "this worker stops", "PeerGone")

    def _guard(self, item: Item | Intake) -> None:
        """Do one thing; whatever goes wrong ends the loads it concerns and nothing else."""
        try:
            if isinstance(item, Job):
                self._begin(item)
            elif isinstance(item, Heard):
                self._hear(item)
            elif isinstance(item, Intake):
                self._advance(item)
            elif item.transfer not in self._intakes:
                self._release(item)
        except Exception as error:  # noqa: BLE001 - the thread's outermost loop: a request must never wait for ever
            self._disconnect(repr(error), "Bug")
            if isinstance(item, Job):
                self._end(Intake(item, time.monotonic(), 0.0), repr(error), "Bug")

    def _begin(self, job: Job) -> None:
        load, now = job.load, time.monotonic()
        intake = Intake(job, now, now + (self._prefill_s if load.streamed else BEGIN_S))
        if load.transfer in self._intakes:  # not to be closed: the first one takes it
            self._end(intake, "another request takes that transfer; a ticket is good for one use", "BadRequest")
            return
        try:
            if job.cancelled.is_set():
                raise TransferError("the request was cancelled")
            deadline = Deadline.after(self._load_s, LOAD_SETTING)
            connection = self._connected(deadline, load.engine)
            connection.use_link(deadline)
            self._intakes[load.transfer] = intake  # not before: whoever makes a connection ends what the old one had
            question = wire.Open(load.transfer, load.prompt, connection.follower, load.reader, load.readers)
            opened = ask(connection.channel, question, deadline)
            if not isinstance(opened, wire.Opened):
                reason = opened.reason if isinstance(opened, wire.Denied) else type(opened).__name__
                raise TransferError(f"{self._name} does not hold the transfer: {reason}")
            intake.learn(0, opened.blocks, opened.ready, time.monotonic())
        except FleetError as error:
            self._fail(intake, error)

    def _hear(self, heard: Heard) -> None:
        if heard.connection is not self._connection:
            return
        if heard.updates is None:
            self._disconnect(f"{self._name} closed the connection")
            return
        now = time.monotonic()
        for update in heard.updates:
            intake = self._intakes.get(update.transfer)
            if intake is None:
                continue
            if update.gone:
                self._fail(intake, TransferError(f"{self._name} does not hold the blocks any more"))
                continue
            try:
                intake.learn(update.first, update.blocks, update.ready, now)
            except ValueError as error:
                self._fail(intake, Corrupt(f"{self._name} told {error}"))

    def _advance(self, intake: Intake) -> None:
        """Copy what is ready; end the load when that was all, or when its time is over."""
        load = intake.job.load
        if load.transfer not in self._intakes:
            return
        try:
            if intake.job.cancelled.is_set():
                raise TransferError("the request was cancelled")
            theirs, ours = intake.next_blocks()
            if ours:
                self._copy(intake, theirs, ours)
            else:
                self._prepare(intake)
            if intake.done:
                self._finish(intake)
            elif time.monotonic() >= intake.deadline:
                waited, setting = (
                    (self._prefill_s, PREFILL_SETTING) if load.streamed else (BEGIN_S, "connector.peer.BEGIN_S")
                )
                what = f"computing the prompt ({intake.ready} of {load.tokens} tokens are ready)"
                raise DeadlineExceeded(self._name, what, waited, setting)
        except FleetError as error:
            self._fail(intake, error)

    def _copy(self, intake: Intake, theirs: list[int], ours: tuple[int, ...]) -> None:
        connection, load = self._connection, intake.job.load
        assert connection is not None
        deadline = Deadline.after(self._load_s, LOAD_SETTING)
        began = time.monotonic()
        kept, intake.prepared = intake.prepared, None
        if kept is not None and kept[:2] == (intake.copied, intake.copied + len(ours)):
            plan = kept[2]
        else:
            plan = plan_part(load, connection.shapes, self._own.shapes, theirs, ours)
        chosen = connection.use_link(deadline)
        try:
            with connection.verifier.checking(connection.channel, chosen.handle.pool, plan, deadline):
                intake.job.running = chosen.link.read(plan)
                if intake.job.cancelled.is_set():
                    intake.job.running.cancel()
                intake.job.running.wait(deadline)
        except ChecksumError:
            connection.drop_link()  # not trusted until it was made, and checked, anew
            raise
        finally:
            intake.job.running = None
        intake.copied += len(ours)
        intake.copies += 1
        intake.nbytes += plan.total_bytes
        intake.copy_s += time.monotonic() - began

    def _prepare(self, intake: Intake) -> None:
        """Get the next copy ready while prefill computes what it copies."""
        connection, (theirs, ours) = self._connection, intake.upcoming_blocks()
        if connection is None or not ours:
            return
        until = intake.copied + len(ours)
        if intake.prepared is None or intake.prepared[:2] != (intake.copied, until):
            plan = plan_part(intake.job.load, connection.shapes, self._own.shapes, theirs, ours)
            intake.prepared = (intake.copied, until, plan)
            connection.prepare(plan)

    def _finish(self, intake: Intake) -> None:
        connection, load = self._connection, intake.job.load
        assert connection is not None
        deadline = Deadline.after(self._load_s, LOAD_SETTING)
        closed = ask(connection.channel, wire.Close(load.transfer, taken=True, reader=load.reader), deadline)
        if not isinstance(closed, wire.Closed) or not closed.valid:
            raise TransferError(f"{self._name} did not hold the blocks until they were read")
        self._end(intake, None, "")

    def _fail(self, intake: Intake, error: FleetError) -> None:
        """End a load, and tell the peer, if it still listens; else forget the connection."""
        load, cancelled = intake.job.load, intake.job.cancelled.is_set()
        if not cancelled:
            log.warn("handoff.failed", request=load.request, peer=self._name, reason=str(error))
        self._end(intake, str(error), "cancelled" if cancelled else type(error).__name__)
        connection = self._connection
        if connection is None:
            return
        try:
            deadline = Deadline.after(RELEASE_S, "connector.peer.RELEASE_S")
            ask(connection.channel, wire.Close(load.transfer, taken=False, reader=load.reader), deadline)
        except FleetError as broken:
            self._disconnect(str(broken))

    def _end(self, intake: Intake, error: str | None, reason: str) -> None:
        """Report a load's end."""
        load, now = intake.job.load, time.monotonic()
        if self._intakes.get(load.transfer) is intake:
            del self._intakes[load.transfer]
        ready = now if intake.complete_at is None else intake.complete_at
        transport = self._connection.transport if self._connection is not None else "none"
        self._ended(
            Ended(
                load.request,
                load.blocks,
                error,
                reason,
                peer=self._name,
                transport=transport,
                nbytes=intake.nbytes,
                copies=intake.copies,
                copy_s=intake.copy_s,
                wait_s=ready - intake.began,
                whole_s=now - intake.began,
                tokens=intake.copied * load.block_tokens,
                job=intake.job,
            )
        )

    def _release(self, release: Release) -> None:
        try:
            deadline = Deadline.after(RELEASE_S, "connector.peer.RELEASE_S")
            connection = self._connected(deadline)
            ask(connection.channel, wire.Close(release.transfer, taken=False, reader=release.reader), deadline)
        except FleetError as error:
            self._disconnect(str(error))

    # Connections -------------------------------------------------------------------------------------------------

    def _connected(self, deadline: Deadline, engine: str = "") -> Connection:
        """The connection, made again when it broke or the peer has restarted since."""
        kept = self._connection
        alive = kept is not None and kept.is_open()
        if kept is not None and alive and engine in ("", kept.engine):
            return kept
        if not alive:
            self._disconnect(f"{self._name} closed the connection")
        made = dial(self._address, self._own, deadline)
        made.follow(lambda updates: self._inbox.put(Heard(made, updates)))
        wanted = engine in ("", made.engine)
        if wanted or not alive:
            self._disconnect(f"{self._name} has started again")
            self._connection = made
        else:  # the ticket is of an engine that has gone: loads from the present one go on
            made.close()
        if not wanted:
            raise PeerGone(f"{self._name} is engine {made.engine} now; the ticket is of {engine}")
        return made

    def _disconnect(self, reason: str, kind: str = "PeerGone") -> None:
        """Forget the connection: what was read over it and not closed cannot be vouched for."""
        connection, self._connection = self._connection, None
        if connection is not None:
            log.event("link.lost", peer=self._name, reason=reason)
            connection.close()
        for intake in list(self._intakes.values()):
            if not intake.job.cancelled.is_set():
                log.warn("handoff.failed", request=intake.job.load.request, peer=self._name, reason=reason)
            self._end(intake, reason, "cancelled" if intake.job.cancelled.is_set() else kind)

    @property
    def _name(self) -> str:
        return f"{self._address.host}:{self._address.port}"
