"""One request at one instance: sends it, passes on or keeps what comes back, counts what fails. Knows no sockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass

from vllm_fleet.core import limits, log
from vllm_fleet.core.env import Env
from vllm_fleet.router import headers, problem
from vllm_fleet.router.audit import Audit
from vllm_fleet.router.call import Call
from vllm_fleet.router.fleet_view import FleetView
from vllm_fleet.router.handoff import NO_PARAMS, Handoff, PassOn, Send, Step
from vllm_fleet.router.metrics import Metrics
from vllm_fleet.router.reply import Reply
from vllm_fleet.router.sse import EventStream
from vllm_fleet.router.upstream import Upstream, UpstreamAnswer, UpstreamFailure
from vllm_fleet.wire.control import Member


@dataclass(frozen=True, slots=True)
class PrefillAnswer:
    """What a prefill instance answered, complete."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes


class Throttle:
    """Says whether a warning of this kind is due again: a flood of failures must not become a flood of lines."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, ...], float] = {}

    def due(self, now: float, *key: str) -> bool:
        """Whether to warn now; counts as having warned."""
        if now - self._last.get(key, float("-inf")) < limits.WARN_EVERY_S:
            return False
        if len(self._last) >= limits.MEMBERS_MAX:
            self._last.clear()
        self._last[key] = now
        return True


class Asking:
    """All that one router asks of instances. Belongs to one event loop."""

    def __init__(self, view: FleetView, upstream: Upstream, audit: Audit, metrics: Metrics, env: Env) -> None:
        self._view, self._upstream, self._env = view, upstream, env
        self._audit, self._metrics = audit, metrics
        self._throttle = Throttle()
        self._waiting: dict[str, set[asyncio.Timeout]] = {}

    def gone(self, incarnations: Iterable[str]) -> None:
        """The controller says that these ended: whoever waits for one of them is told at once."""
        for incarnation in incarnations:
            for scope in self._waiting.get(incarnation, ()):
                if not scope.expired():
                    scope.reschedule(0.0)

    async def prefill(self, call: Call, send: Send) -> PrefillAnswer | UpstreamFailure:
        """Ask a prefill instance; its answer is here in full, or it failed, which has been counted and logged."""
        began = self._env.now()
        call.timeline.mark("prefill_sent", began)
        wanted = headers.to_instance(call.headers, f"{call.request_id}-p")
        url = send.member.url + call.request.route.value
        try:
            async with self._unless_gone(send.member), self._upstream.post(url, wanted, send.body) as answer:
                body = await answer.read(limits.PREFILL_ANSWER_BYTES_MAX)
        except UpstreamFailure as failure:
            self._failed(call, send, failure)
            return failure
        now = self._env.now()
        self._view.mark_up(send.member.name)
        self._metrics.prefill.observe(now - began)
        call.timeline.mark("prefill_answered", now)
        if answer.status != 200 and not 400 <= answer.status < 500:
            self._failed(call, send, _bad_status(answer))
        return PrefillAnswer(answer.status, answer.headers, body)

    def judge(self, call: Call, handoff: Handoff, send: Send, found: PrefillAnswer | UpstreamFailure) -> Step:
        """What to do about what prefill said."""
        now = self._env.now()
        if isinstance(found, UpstreamFailure):
            return handoff.on_prefill_failure(now)
        step = handoff.on_prefill_answer(found.status, found.body, now)
        if handoff.outcome == NO_PARAMS and self._throttle.due(now, NO_PARAMS, send.member.name):
            log.warn("handoff.no_params", prefill=send.member.name, request=call.request_id)
        return step

    async def decode(self, call: Call, handoff: Handoff, send: Send, reply: Reply) -> Step:
        """Ask a decode instance and pass its answer on.

        Raises:
            ClientGone: nobody takes the answer any more.
        """
        wanted = headers.to_instance(call.headers, call.request_id)
        url = send.member.url + call.request.route.value
        judged = handoff.handed_off and self._audit.known(send.member.name)
        call.timeline.mark("decode_sent", self._env.now())
        try:
            async with self._unless_gone(send.member), self._upstream.post(url, wanted, send.body) as answer:
                self._view.mark_up(send.member.name)
                if answer.status >= 400:
                    return await self._decode_error(call, handoff, send, answer, reply)
                if answer.status >= 300:
                    raise _bad_status(answer)
                if headers.content_type(answer.headers) == "text/event-stream":
                    await _relay_stream(answer, handoff, reply)
                else:
                    await _relay_whole(answer, handoff, reply)
        except UpstreamFailure as failure:
            self._failed(call, send, failure)
            if not reply.started:
                return handoff.on_decode_failure(failure.kind, self._env.now())
            await reply.end_with(problem.stream_broke(send.member.name))
        finally:
            if judged and reply.status is not None and reply.status < 300:
                self._audit.sent(send.member.name, self._env.now())
        return PassOn()

    async def _decode_error(
        self, call: Call, handoff: Handoff, send: Send, answer: UpstreamAnswer, reply: Reply
    ) -> Step:
        body = await answer.read(limits.ERROR_BODY_BYTES_MAX)
        step = handoff.on_decode_status(answer.status, self._env.now())
        if isinstance(step, PassOn):
            await reply.error(answer.status, answer.headers, body, send.member.name)
        if answer.status >= 500:
            self._failed(call, send, _bad_status(answer))
        return step

    @contextlib.asynccontextmanager
    async def _unless_gone(self, member: Member) -> AsyncIterator[None]:
        """Leave with UpstreamFailure when the controller says that ``member`` is gone."""
        scope = asyncio.timeout(None)
        waiting = self._waiting.setdefault(member.incarnation, set())
        try:
            async with scope:
                waiting.add(scope)
                yield
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise UpstreamFailure("gone", "the controller says that it is gone") from error
        finally:
            waiting.discard(scope)
            if not waiting:
                self._waiting.pop(member.incarnation, None)

    def _failed(self, call: Call, send: Send, failure: UpstreamFailure) -> None:
        self._metrics.failures.labels(send.stage, failure.kind).inc()
        now = self._env.now()
        if failure.kind == "refused":
            self._view.mark_down(send.member, now)
        if self._throttle.due(now, send.stage, failure.kind, send.member.name):
            log.warn(
                "upstream.failed",
                instance=send.member.name,
                stage=send.stage,
                kind=failure.kind,
                reason=failure.reason,
                request=call.request_id,
            )


async def _relay_stream(answer: UpstreamAnswer, handoff: Handoff, reply: Reply) -> None:
    """Pass events on as they come."""
    events = EventStream()
    async for chunk in answer.chunks():
        if data := events.feed(chunk):
            handoff.on_decode_begun()
            await reply.part(answer.status, answer.headers, data)
    if data := events.rest():
        handoff.on_decode_begun()
        await reply.part(answer.status, answer.headers, data)
    if not events.done:
        raise UpstreamFailure("disconnected", "the stream ended before [DONE]")


async def _relay_whole(answer: UpstreamAnswer, handoff: Handoff, reply: Reply) -> None:
    """Kept until complete where it fits, so that an instance that dies meanwhile costs the client nothing."""
    handoff.on_decode_begun()
    kept = bytearray()
    async for chunk in answer.chunks():
        if reply.started:
            await reply.part(answer.status, answer.headers, chunk)
            continue
        kept += chunk
        if len(kept) > limits.ANSWER_BUFFER_BYTES_MAX:
            await reply.part(answer.status, answer.headers, bytes(kept))
    if not reply.started:
        await reply.whole(answer.status, answer.headers, bytes(kept))


def _bad_status(answer: UpstreamAnswer) -> UpstreamFailure:
    return UpstreamFailure("status_5xx" if answer.status >= 500 else "bad_answer", f"status {answer.status}")
