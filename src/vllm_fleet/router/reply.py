"""The answer of one request on its way to the client: its headers, its body, its end. Knows no sockets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from vllm_fleet.core.env import Env
from vllm_fleet.router import headers, problem
from vllm_fleet.router.call import Call
from vllm_fleet.router.handoff import Handoff
from vllm_fleet.router.metrics import Metrics
from vllm_fleet.router.problem import Problem


class ClientGone(Exception):
    """The client hung up; nobody reads the answer."""


class Sink(Protocol):
    """Where an answer goes. ``write`` returns when the client has taken enough of it: that is the backpressure.

    ``start`` and ``write`` raise ClientGone when the client hung up. ``start`` is called once, before any ``write``.
    """

    async def start(self, status: int, pairs: headers.Pairs, length: int | None) -> None:
        """Send status and headers; ``length`` of the body where it is known."""
        ...

    async def write(self, data: bytes) -> None:
        """Send a part of the body."""
        ...

    def abort(self) -> None:
        """Cut the connection, so that the client cannot take the answer for a complete one."""
        ...


class Reply:
    """One answer, started at most once, always with the headers that say who took part."""

    def __init__(self, sink: Sink, handoff: Handoff, metrics: Metrics, env: Env, call: Call) -> None:
        self._sink, self._handoff, self._metrics, self._env, self._call = sink, handoff, metrics, env, call
        self._stream = False
        self._last = 0.0
        self.status: int | None = None
        """What the client was told; None: nothing yet."""

    @property
    def started(self) -> bool:
        """Whether status and headers are out and cannot be changed any more."""
        return self.status is not None

    async def part(self, status: int, pairs: Iterable[tuple[str, str]], data: bytes) -> None:
        """Pass on a part of an instance's answer; the first part starts the reply."""
        if not data:
            return
        if not self.started:
            await self._start(status, headers.to_client(pairs), None)
        elif self._stream:
            now = self._env.now()
            self._metrics.meters.between.observe(now - self._last)
            self._last = now
        await self._write(data)

    async def whole(self, status: int, pairs: Iterable[tuple[str, str]], body: bytes) -> None:
        """Pass on an instance's whole answer."""
        if self.started:  # it was to go on with a stream
            self.abort()
            return
        await self._start(status, headers.to_client(pairs), len(body))
        await self._write(body)

    async def error(self, status: int, pairs: Iterable[tuple[str, str]], body: bytes, instance: str) -> None:
        """Pass on an instance's error, as an OpenAI error object."""
        if self.started:  # it was to go on with a stream
            await self.end_with(problem.stream_broke(instance))
            return
        wrapped = problem.foreign(instance, status, body)
        kept = headers.to_client(pairs)
        if wrapped is not body:
            kept = [(name, value) for name, value in kept if not name.lower().startswith("content-")]
            kept.append(("content-type", problem.JSON))
        await self._start(status, kept, len(wrapped))
        await self._write(wrapped)

    async def end_with(self, reason: Problem) -> None:
        """End with an error of ours: as the answer, as a stream's last event, or by cutting an answer half sent."""
        if not self.started:
            body = reason.body()
            pairs = [("content-type", problem.JSON), *reason.headers.items()]
            await self._start(reason.status, pairs, len(body))
            await self._write(body)
        elif self._stream:
            await self._write(reason.event())
        else:
            self.abort()

    def abort(self) -> None:
        """Cut the connection."""
        self._sink.abort()

    async def _start(self, status: int, pairs: headers.Pairs, length: int | None) -> None:
        self.status = status
        self._stream = headers.content_type(pairs) == "text/event-stream"
        now = self._env.now()
        self._last = now
        self._call.timeline.mark("first_byte", now)
        self._metrics.first_byte.labels(self._call.request.route.value).observe(now - self._call.began)
        await self._sink.start(status, [*pairs, *self._ours()], length)

    def _ours(self) -> headers.Pairs:
        """Who took part and, for a client that asked, how long it took."""
        ours = [(headers.HANDOFF, self._handoff.outcome)]
        if self._handoff.handed_off:
            ours.append((headers.HANDOFF_MODE, self._handoff.mode))
        if self._handoff.prefill is not None:
            ours.append((headers.PREFILL, self._handoff.prefill.name))
        if self._handoff.decode is not None:
            ours.append((headers.DECODE, self._handoff.decode.name))
        if self._call.headers.get(headers.TIMELINE) == "1" and (known := self._call.timeline.server_timing()):
            ours.append((headers.SERVER_TIMING, known))
        return ours

    async def _write(self, data: bytes) -> None:
        self._metrics.answer_bytes.inc(len(data))
        self._call.timeline.bytes_out += len(data)
        await self._sink.write(data)
