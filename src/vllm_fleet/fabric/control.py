"""The control connection of links whose bytes a foreign library moves: may I, does it still stand, is the peer there.

The library's own sockets are not authenticated and know nothing of registrations and grants. So every transfer asks the
owner's endpoint before it starts and after it has ended, and the connection's end tells of the owner's death.
"""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Iterator

from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import Corrupt, PeerGone
from vllm_fleet.fabric.contract import TransferError
from vllm_fleet.fabric.endpoint import Endpoint, probe, receive_answer
from vllm_fleet.fabric.owner import OwnedPool, encode_runs
from vllm_fleet.fabric.plan import BlockCopyPlan
from vllm_fleet.net.channel import Channel, Credentials, connect
from vllm_fleet.wire import fabric as wire

IDLE_S = 10.0
"""A transfer fails when the peer is silent, or the library moves nothing, for this long."""

IDLE_SETTING = "fabric.control.IDLE_S"
GRACE_S = 0.5
"""What is under way at the time of a cancel may end by itself for so long; then the link's library is shut down."""

RECONNECT_S = 2.0
CHECK_RUNS_MAX = 16_384
"""Runs of one question; it is answered in about a millisecond."""

_TICK_MS = 20


class Stop(TransferError):
    """The transfer was cancelled while it waited."""


class Control:
    """One authenticated connection to the owner of a pool, made again after a failure. For the link's thread only."""

    def __init__(self, host: str, port: int, credentials: Credentials, pool: str) -> None:
        self.peer = f"{host}:{port}"
        self.pool = pool
        self._address = (host, port)
        self._credentials = credentials
        self._channel: Channel | None = None

    def open(self, deadline: Deadline) -> Channel:
        """Connect and ask whether the registration stands; errors as of connect() and probe()."""
        channel = connect(*self._address, self._credentials, deadline)
        try:
            probe(channel, self.pool, deadline)
        except BaseException:
            channel.close()
            raise
        self.close()
        self._channel = channel
        return channel

    @property
    def is_open(self) -> bool:
        """Whether there is a connection that nothing has gone wrong on."""
        return self._channel is not None

    def ask(
        self,
        question: wire.Question,
        cancelled: threading.Event,
        grace_s: float = 0.0,
    ) -> wire.Answer:
        """Ask, looking at ``cancelled`` while the answer is awaited.

        Raises:
            Stop: no answer had come ``grace_s`` after the transfer was cancelled; the connection is lost.
            TransferError: refused, or no answer within IDLE_S.
            PeerGone: the owner is gone.
        """
        deadline = Deadline.after(IDLE_S, IDLE_SETTING)
        channel = self._channel
        if channel is None:
            channel = self.open(deadline.capped(RECONNECT_S))
        try:
            channel.send(wire.encode(question), deadline)
            self._wait(channel, cancelled, grace_s, deadline)
            answer = receive_answer(channel, deadline)
        except BaseException:
            self.close()
            raise
        if isinstance(answer, wire.Denied):
            raise TransferError(f"{self.peer} refused the transfer: {answer.reason} {answer.detail}".rstrip())
        return answer

    def _wait(self, channel: Channel, cancelled: threading.Event, grace_s: float, deadline: Deadline) -> None:
        stop_at = None
        answered = select.poll()
        answered.register(channel.socket, select.POLLIN)
        while not answered.poll(_TICK_MS):
            deadline.check(self.peer, "answering")
            if cancelled.is_set():
                stop_at = time.monotonic() + grace_s if stop_at is None else stop_at
                if time.monotonic() >= stop_at:
                    raise Stop("the transfer was cancelled")

    def check(self, question: wire.Question, cancelled: threading.Event) -> None:
        """Ask for a permission, or whether the registration stands; errors as of ask()."""
        answer = self.ask(question, cancelled)
        if answer != wire.Probed(self.pool):
            raise Corrupt(f"{self.peer} answered a check with {type(answer).__name__}")

    def permit(
        self, kind: type[wire.NixlCheck], plan: BlockCopyPlan, *, write: bool, cancelled: threading.Event
    ) -> Iterator[slice]:
        """Ask for the plan's runs, some at a time; slices that may be moved. Errors as of ask()."""
        offsets = plan.target if write else plan.source
        for start in range(0, len(plan), CHECK_RUNS_MAX):
            part = slice(start, start + CHECK_RUNS_MAX)
            runs = encode_runs(plan.region[part], offsets[part], plan.nbytes[part])
            self.check(kind(plan.grant, self.pool, write, runs), cancelled)
            yield part

    def stands(self, cancelled: threading.Event) -> None:
        """Whether the registration stood all the time: asked after a transfer. Errors as of ask()."""
        self.check(wire.Probe(self.pool), cancelled)

    def check_alive(self) -> None:
        """PeerGone when the owner has closed the connection; does not wait."""
        if self._channel is None or not self._channel.is_open():
            raise PeerGone(f"{self.peer} closed the connection in the middle of a transfer")

    def close(self) -> None:
        """Close the connection. Safe to call twice."""
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()


def serve_checks(endpoint: Endpoint, owned: OwnedPool, kind: type[wire.NixlCheck]) -> None:
    """Answer one library's checks for a registered pool."""

    def check(channel: Channel, question: wire.Question) -> wire.Answer:
        assert isinstance(question, wire.NixlCheck)
        runs = owned.check(question.pool, question.grant, question.runs, write=question.write)
        return runs if isinstance(runs, wire.Denied) else wire.Probed(question.pool)

    endpoint.handle(kind, check)
