"""The one port on which a worker answers its peers: authenticated connections, typed questions, a handler for each."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import Corrupt, FleetError, PeerGone
from vllm_fleet.fabric.plan import Ints
from vllm_fleet.net.channel import Channel, ChannelServer, Credentials
from vllm_fleet.wire import fabric as wire
from vllm_fleet.wire.names import DECODE_ERRORS

if TYPE_CHECKING:
    from vllm_fleet.fabric.contract import KVPool

Handler: TypeAlias = Callable[[Channel, wire.Question], wire.Answer | None]
"""Answers one question; None when it has sent the answer itself."""

Grant: TypeAlias = Callable[[str, Ints, Ints, Ints], bool]
"""Whether a grant covers runs: (grant, regions, offsets in bytes, lengths in bytes), arrays of shape [runs]."""

ANSWER_S = 10.0
ANSWER_SETTING = "fabric.endpoint.ANSWER_S"


class Endpoint:
    """Dispatches the questions of authenticated peers to the handlers registered with ``handle``.

    Handlers run in a thread per connection. A malformed frame or a handler's FleetError closes that connection only.
    ``allow_read`` and ``allow_write`` decide which runs of a registered pool a peer may read (default: all) and write
    (default: none); transports ask them before they touch memory on a peer's behalf.
    """

    def __init__(self, listener: socket.socket, credentials: Credentials) -> None:
        self.credentials = credentials
        self.allow_read: Grant = lambda grant, regions, offsets, nbytes: True
        self.allow_write: Grant = lambda grant, regions, offsets, nbytes: False
        self.registrations: dict[str, KVPool] = {}
        """The pools registered now, by the id of their registration; OwnedPool keeps it."""
        self._handlers: dict[type, Handler] = {
            wire.Ping: lambda channel, question: wire.Pong(),
            wire.Probe: self._probe,
        }
        self._on_lost: list[Callable[[Channel], None]] = []
        self._server = ChannelServer(listener, credentials, self._serve)

    @property
    def host(self) -> str:
        return str(self._server.host)

    @property
    def port(self) -> int:
        return int(self._server.port)

    def handle(self, question: type, handler: Handler) -> None:
        """Let ``handler`` answer questions of this type; before start()."""
        self._handlers[question] = handler

    def on_lost(self, callback: Callable[[Channel], None]) -> None:
        """Call back when a connection that had proved the token has ended."""
        self._on_lost.append(callback)

    def start(self) -> None:
        self._server.start()

    def close(self) -> None:
        """Stop listening and end every connection."""
        self._server.close()

    def _probe(self, channel: Channel, question: wire.Question) -> wire.Answer:
        assert isinstance(question, wire.Probe)
        stands = question.pool in self.registrations
        return wire.Probed(question.pool) if stands else wire.Denied("stale_pool")

    def _serve(self, channel: Channel) -> None:
        try:
            while True:
                payload = channel.receive_idle()
                if payload is None:
                    return
                try:
                    question = wire.decode_question(payload)
                except DECODE_ERRORS:
                    raise Corrupt(f"{len(payload)} bytes that are no question of the fabric") from None
                handler = self._handlers.get(type(question))
                answer = handler(channel, question) if handler is not None else wire.Denied("unsupported")
                if answer is not None:
                    channel.send(wire.encode(answer), Deadline.after(ANSWER_S, ANSWER_SETTING))
        finally:
            for callback in self._on_lost:
                callback(channel)


def ask(channel: Channel, question: wire.Question, deadline: Deadline) -> wire.Answer:
    """Ask a peer's endpoint; its answer. Raises PeerGone, DeadlineExceeded, or Corrupt for what is no answer.

    The connection is closed then, see receive_answer().
    """
    try:
        channel.send(wire.encode(question), deadline)
    except FleetError:
        channel.close()
        raise
    return receive_answer(channel, deadline)


def receive_answer(channel: Channel, deadline: Deadline) -> wire.Answer:
    """The answer to the oldest question sent on a channel; errors as of ask().

    The connection is closed when there is none: one that comes later would be taken for that to the next question.
    """
    try:
        payload = channel.receive(deadline)
        try:
            answer: wire.Answer = wire.decode_answer(payload)
        except DECODE_ERRORS:
            raise Corrupt(f"{channel.peer} answered {len(payload)} bytes that are no answer of the fabric") from None
    except FleetError:
        channel.close()
        raise
    return answer


def probe(channel: Channel, pool: str, deadline: Deadline) -> None:
    """Ask a peer whether one of its registrations stands. Raises PeerGone when it does not, errors as of ask()."""
    answer = ask(channel, wire.Probe(pool), deadline)
    if isinstance(answer, wire.Denied):
        raise PeerGone(f"{channel.peer} has withdrawn that memory: {answer.reason}")
    if answer != wire.Probed(pool):
        raise Corrupt(f"{channel.peer} answered a probe with {type(answer).__name__}")
