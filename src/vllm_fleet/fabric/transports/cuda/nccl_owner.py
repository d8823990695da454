"""The owner's half of the nccl transport: joins the communicators that peers ask for and serves the pool through them.

One session for each connection: everything it holds ends with the connection, with a later communicator of the same
pair, or when a transfer makes no progress for IDLE_S. A transfer is one conversation on the connection, in the thread
of that connection: questions with ``more`` are answered when checked, the last one once more when all is in the pool (a
write) or has been read from it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from vllm_fleet.core import limits
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import BadRequest, Corrupt, FleetError
from vllm_fleet.fabric.contract import TransferError
from vllm_fleet.fabric.endpoint import ANSWER_S, ANSWER_SETTING, Endpoint
from vllm_fleet.fabric.owner import OwnedPool
from vllm_fleet.fabric.rendezvous import Meeting
from vllm_fleet.fabric.transports.cuda.communicator import Communicator
from vllm_fleet.fabric.transports.cuda.joining import calls_apart, come_and_leave
from vllm_fleet.fabric.transports.cuda.nccl_pieces import lead_and_rest, message_sizes
from vllm_fleet.fabric.transports.cuda.nccl_tuning import Tuning
from vllm_fleet.fabric.transports.cuda.pipe import IDLE_S, IDLE_SETTING, ROW_BYTES_MAX, Pipe
from vllm_fleet.net.channel import Channel
from vllm_fleet.wire import fabric as wire
from vllm_fleet.wire.names import DECODE_ERRORS

JOIN_S = 10.0
"""Both sides must be in a new communicator within this time (0.6 s on one host)."""
JOIN_SETTING = "fabric.transports.cuda.nccl_owner.JOIN_S"

PIECES_MAX = 64
"""One question may ask for so many whole pieces: the asker needs 40, and rows are made before any byte moves."""

NO_COMMUNICATOR = wire.Denied("unsupported", "join a communicator first")

STOP_S = 40.0
"""Withdrawing memory waits so long for the sessions that use it: longer than ending a transfer takes (pipe.DRAIN_S)."""


class _Invited:
    """The Rendezvous of a worker that was asked: its place is already known, and nobody else is to come."""

    def __init__(self, meeting: Meeting) -> None:
        self._meeting = meeting

    def meet(self, create: Callable[[], bytes], deadline: Deadline) -> Meeting:
        return self._meeting

    def joined(self, meeting: Meeting) -> bool:
        return True


@dataclass(eq=False)
class _Session:
    channel: Channel
    pair: str
    epoch: int
    device: int
    chunk_bytes: int
    stop: threading.Event = field(default_factory=threading.Event)
    busy: threading.Lock = field(default_factory=threading.Lock)
    """Held while the pool is used or a communicator is made."""
    pipe: Pipe | None = None

    def watch(self) -> None:
        """Raises when the session is to end."""
        if self.stop.is_set():
            raise TransferError("the memory was withdrawn, or the peer has made a new communicator")
        self.channel.has_arrived()

    def end(self) -> None:
        """Abort the communicator; for the thread that holds ``busy``."""
        pipe, self.pipe = self.pipe, None
        if pipe is not None:
            with torch.cuda.device(self.device):
                pipe.abort()


class NcclOwner:
    """See the module's docstring. Safe to use from several threads."""

    def __init__(self, endpoint: Endpoint, owned: OwnedPool, tuning: Tuning) -> None:
        self._owned, self._tuning = owned, tuning
        self._lock = threading.Lock()
        self._sessions: dict[Channel, _Session] = {}
        endpoint.handle(wire.NcclJoin, self._join)
        endpoint.handle(wire.NcclPing, self._ping)
        endpoint.handle(wire.NcclRead, self._transfer)
        endpoint.handle(wire.NcclWrite, self._transfer)
        endpoint.on_lost(self._lost)

    @property
    def sessions(self) -> int:
        """Sessions open now."""
        with self._lock:
            return len(self._sessions)

    def stop(self) -> None:
        """End every session; when this has returned none of them uses the pool or holds a communicator.

        Raises:
            TransferError: one did not end within STOP_S.
        """
        with self._lock:
            sessions = list(self._sessions.values())
        deadline = Deadline.after(STOP_S, "fabric.transports.cuda.nccl_owner.STOP_S")
        for session in sessions:
            session.stop.set()
            session.channel.abort()
        for session in sessions:
            if not session.busy.acquire(timeout=deadline.remaining()):
                raise TransferError(f"the transfer with {session.channel.peer} did not end within {STOP_S:.0f} s")
            try:
                session.end()
            finally:
                session.busy.release()

    def _join(self, channel: Channel, question: wire.Question) -> wire.Answer | None:
        assert isinstance(question, wire.NcclJoin)
        self._lost(channel)  # a second communicator on one connection takes the place of the first
        session = self._admit(channel, question)
        if isinstance(session, wire.Denied):
            return session
        meeting = Meeting(rank=1, ranks=2, epoch=question.epoch, group_id=question.unique_id)
        try:
            tuning = self._tuned(question)
            try:
                _answer(channel, wire.NcclJoined(question.epoch))
            except FleetError:  # it cannot know, and waits
                come_and_leave(meeting, session.device, tuning)
                raise
            with session.busy, torch.cuda.device(session.device):
                deadline = Deadline.after(JOIN_S, JOIN_SETTING)
                communicator = Communicator(_Invited(meeting), session.device, tuning, session.watch, deadline)
                try:
                    session.pipe = Pipe(communicator, session.device, tuning)
                except BaseException:
                    communicator.abort()
                    raise
        except FleetError as error:
            self._lost(channel)
            return wire.Denied("unsupported", str(error)[: limits.ID_LEN_MAX])
        return wire.NcclJoined(question.epoch)

    def _tuned(self, question: wire.NcclJoin) -> Tuning:
        """The tuning of this side; BadRequest when the asker wants more than there is."""
        lanes, rest = divmod(len(question.unique_id), limits.NCCL_ID_BYTES)
        if rest:
            raise BadRequest(f"an id of {len(question.unique_id)} bytes")
        buffers = min(self._tuning.buffers, self._tuning.staging_bytes_max // question.chunk_bytes)
        return replace(
            self._tuning, chunk_bytes=question.chunk_bytes, buffers=buffers, ctas_max=question.ctas, lanes=lanes
        )

    def _admit(self, channel: Channel, question: wire.NcclJoin) -> _Session | wire.Denied:
        pool = self._owned.pool
        if pool is None or pool.cuda is None or not self._owned.is_current(question.pool):
            return wire.Denied("stale_pool")
        with self._lock:
            former = next((other for other in self._sessions.values() if other.pair == question.pair), None)
            if former is not None and former.epoch >= question.epoch:
                return wire.Denied("already_open", f"this pair has reached epoch {former.epoch}")
            count = len(self._sessions) + calls_apart()
            if former is None and count >= limits.NCCL_SESSIONS_MAX:
                return wire.Denied("unsupported", f"this worker has {count} communicators, the most")
            session = _Session(channel, question.pair, question.epoch, pool.cuda, question.chunk_bytes)
            self._sessions[channel] = session
        if former is not None:
            former.stop.set()
            former.channel.abort()
        return session

    def _lost(self, channel: Channel) -> None:
        with self._lock:
            session = self._sessions.get(channel)
        if session is not None:
            try:
                with session.busy:
                    session.end()
            finally:
                with self._lock:
                    self._sessions.pop(channel, None)

    def _ping(self, channel: Channel, question: wire.Question) -> wire.Answer | None:
        assert isinstance(question, wire.NcclPing)
        session = self._sessions.get(channel)
        if session is None:
            return NO_COMMUNICATOR
        with session.busy, torch.cuda.device(session.device):
            if session.pipe is None:
                return NO_COMMUNICATOR
            _answer(channel, wire.Reading(len(question.pattern)))
            same = session.pipe.exchange(question.pattern, session.watch) == question.pattern
        if not same:
            return wire.Denied("unsupported", "something else than the pattern came through NCCL")
        return wire.Moved(len(question.pattern))

    def _transfer(self, channel: Channel, question: wire.Question) -> wire.Answer | None:
        session = self._sessions.get(channel)
        if session is None:
            return NO_COMMUNICATOR
        with session.busy, torch.cuda.device(session.device):
            if session.pipe is None:
                return NO_COMMUNICATOR
            try:
                answer, clean = self._converse(session, session.pipe, question)
            except BaseException:
                session.end()
                raise
            if not clean:
                session.end()
        return answer

    def _converse(self, session: _Session, pipe: Pipe, question: wire.Question) -> tuple[wire.Answer | None, bool]:
        """Carry out one transfer; the last answer unless it is sent, and whether the communicator is left empty."""
        total = 0
        while True:
            assert isinstance(question, wire.NcclRead | wire.NcclWrite)
            write = isinstance(question, wire.NcclWrite)
            session.watch()
            runs = self._owned.check(question.pool, question.grant, question.runs, write=write)
            if isinstance(runs, wire.Denied):
                return runs, total == 0
            nbytes = runs.total_bytes
            if nbytes > PIECES_MAX * session.chunk_bytes:
                return wire.Denied("unsupported", f"{nbytes} bytes in one question"), total == 0
            _answer(session.channel, wire.Writing(nbytes) if write else wire.Reading(nbytes))
            sizes = message_sizes(nbytes, session.chunk_bytes)
            move = pipe.receive if write else pipe.send
            for pieces in lead_and_rest(runs.addresses, runs.nbytes, sizes, ROW_BYTES_MAX):
                move(pieces, session.watch)
            total += nbytes
            if not question.more:
                break
            question = _next(session.channel, type(question))
        # Of a read it is said while the last messages are on their way: nothing looks at the pool any more.
        (pipe.drain if write else pipe.await_copies)(session.watch)
        moved = wire.Moved(total) if self._owned.is_current(question.pool) else wire.Denied("stale_pool")
        _answer(session.channel, moved)
        pipe.drain(session.watch)
        return None, True


def _answer(channel: Channel, answer: wire.Answer) -> None:
    channel.send(wire.encode(answer), Deadline.after(ANSWER_S, ANSWER_SETTING))


def _next(channel: Channel, kind: type) -> wire.Question:
    """The next question of a transfer, which must come within IDLE_S and be of the same kind."""
    payload = channel.receive(Deadline.after(IDLE_S, IDLE_SETTING))
    try:
        question: wire.Question = wire.decode_question(payload)
    except DECODE_ERRORS:
        raise Corrupt(f"{len(payload)} bytes that are no question of the fabric") from None
    if not isinstance(question, kind):
        raise Corrupt(f"{channel.peer} asked {type(question).__name__} in the middle of a transfer")
    return question
