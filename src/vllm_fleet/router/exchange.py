"""Runs one request: does what its Handoff decides, and passes the answer to the client. Knows no sockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from vllm_fleet.core import limits, log
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.env import Env
from vllm_fleet.router import headers, problem
from vllm_fleet.router.audit import Audit
from vllm_fleet.router.fleet_view import FleetView
from vllm_fleet.router.handoff import NO_PARAMS, Fail, Handoff, PassOn, Send, Step
from vllm_fleet.router.metrics import Metrics
from vllm_fleet.router.openai import GenerateRequest
from vllm_fleet.router.policies.contract import Policy
from vllm_fleet.router.problem import Problem
from vllm_fleet.router.reply import Reply, Sink
from vllm_fleet.router.sse import EventStream
from vllm_fleet.router.upstream import Upstream, UpstreamAnswer, UpstreamFailure
from vllm_fleet.wire.control import Change, Member, Snapshot

_LAST_WORD_S = 1.0  # for the error at the end of a request whose time is over


@dataclass(frozen=True, slots=True)
class Call:
    """A client's request, as it came in."""

    request: GenerateRequest
    headers: Mapping[str, str]
    """Looked up in any case."""
    request_id: str
    began: float
    deadline: Deadline


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


class Exchange:
    """All requests of one router. Belongs to one event loop."""

    def __init__(
        self,
        view: FleetView,
        upstream: Upstream,
        audit: Audit,
        metrics: Metrics,
        env: Env,
        *,
        prefill_policy: Policy,
        decode_policy: Policy,
    ) -> None:
        self._view, self._upstream, self._env = view, upstream, env
        self._audit, self._metrics = audit, metrics
        self._prefill_policy, self._decode_policy = prefill_policy, decode_policy
        self._throttle = Throttle()
        self._live: set[asyncio.Timeout] = set()
        self._waiting: dict[str, set[asyncio.Timeout]] = {}
        self.stopping = False
        self.idle = asyncio.Event()
        """Set while no request runs."""
        self.idle.set()

    @property
    def live(self) -> int:
        """Requests running now."""
        return len(self._live)

    def apply(self, event: Snapshot | Change) -> None:
        """Take over what the controller says; requests at instances that are gone go on elsewhere at once."""
        for incarnation in self._view.apply(event, self._env.now()):
            for scope in self._waiting.get(incarnation, ()):
                if not scope.expired():
                    scope.reschedule(0.0)

    def stop(self, seconds: float) -> None:
        """Let running requests go on for ``seconds``, then end them with an error; whoever listens refuses new ones."""
        self.stopping = True
        end = asyncio.get_running_loop().time() + seconds
        for scope in self._live:
            if not scope.expired():
                scope.reschedule(min(end, scope.when() or end))

    async def run(self, call: Call, sink: Sink) -> int:
        """Answer one request. The client got an answer, or one typed error, or its connection was cut.

        Returns:
            The status the client was told.

        Raises:
            ClientGone: the client hung up; all work for it has been cancelled.
        """
        handoff = Handoff(call.request, self._view, self._prefill_policy, self._decode_policy)
        reply = Reply(sink, handoff, self._metrics, self._env, call.request.route.value, call.began)
        scope = asyncio.timeout(call.deadline.remaining())
        self._live.add(scope)
        self.idle.clear()
        try:
            async with scope:
                await self._steps(call, handoff, reply)
        except TimeoutError:
            if not scope.expired():
                raise
            seconds = call.deadline.at - call.deadline.began
            await _give_up(reply, problem.stopping() if self.stopping else problem.deadline(seconds))
        finally:
            self._live.discard(scope)
            if not self._live:
                self.idle.set()
            self._metrics.handoffs.labels(handoff.outcome).inc()
        return reply.status or 500

    async def _steps(self, call: Call, handoff: Handoff, reply: Reply) -> None:
        step: Step = handoff.start(self._env.now())
        while isinstance(step, Send):
            send = self._prefill if step.stage == "prefill" else self._decode
            step = await send(call, handoff, step, reply)
        if isinstance(step, Fail):
            await reply.end_with(step.problem)

    async def _prefill(self, call: Call, handoff: Handoff, send: Send, reply: Reply) -> Step:
        began = self._env.now()
        wanted = headers.to_instance(call.headers, f"{call.request_id}-p")
        url = send.member.url + call.request.route.value
        try:
            async with self._at(send.member), self._upstream.post(url, wanted, send.body) as answer:
                body = await answer.read(limits.PREFILL_ANSWER_BYTES_MAX)
        except UpstreamFailure as failure:
            self._failed(call, send, failure)
            return handoff.on_prefill_failure(self._env.now())
        self._view.mark_up(send.member.name)
        now = self._env.now()
        self._metrics.prefill.observe(now - began)
        step = handoff.on_prefill_answer(answer.status, body, now)
        if isinstance(step, PassOn):
            await reply.error(answer.status, answer.headers, body, send.member.name)
        elif answer.status != 200:
            self._failed(call, send, _bad_status(answer))
        elif handoff.outcome == NO_PARAMS and self._throttle.due(now, NO_PARAMS, send.member.name):
            log.warn("handoff.no_params", prefill=send.member.name, request=call.request_id)
        return step

    async def _decode(self, call: Call, handoff: Handoff, send: Send, reply: Reply) -> Step:
        wanted = headers.to_instance(call.headers, call.request_id)
        url = send.member.url + call.request.route.value
        judged = handoff.handed_off and self._audit.known(send.member.name)
        try:
            async with self._at(send.member), self._upstream.post(url, wanted, send.body) as answer:
                self._view.mark_up(send.member.name)
                if answer.status >= 400:
                    return await self._decode_error(call, handoff, send, answer, reply)
                if answer.status >= 300:
                    raise _bad_status(answer)
                if headers.content_type(answer.headers) == "text/event-stream":
                    await _relay_stream(answer, reply)
                else:
                    await _relay_whole(answer, reply)
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
    async def _at(self, member: Member) -> AsyncIterator[None]:
        """Count a request at ``member``, and leave with UpstreamFailure when the controller says that it is gone."""
        scope = asyncio.timeout(None)
        waiting = self._waiting.setdefault(member.incarnation, set())
        self._view.begin(member.name)
        try:
            async with scope:
                waiting.add(scope)
                yield
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise UpstreamFailure("gone", "the controller says that it is gone") from error
        finally:
            self._view.end(member.name)
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


async def _relay_stream(answer: UpstreamAnswer, reply: Reply) -> None:
    """Pass events on as they come."""
    events = EventStream()
    async for chunk in answer.chunks():
        await reply.part(answer.status, answer.headers, events.feed(chunk))
    await reply.part(answer.status, answer.headers, events.rest())
    if not events.done:
        raise UpstreamFailure("disconnected", "the stream ended before [DONE]")


async def _relay_whole(answer: UpstreamAnswer, reply: Reply) -> None:
    """Kept until complete where it fits, so that an instance that dies meanwhile costs the client nothing."""
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


async def _give_up(reply: Reply, reason: Problem) -> None:
    """The request's time is over: say so, if the client takes it soon."""
    try:
        async with asyncio.timeout(_LAST_WORD_S):
            await reply.end_with(reason)
    except TimeoutError:
        reply.abort()


def _bad_status(answer: UpstreamAnswer) -> UpstreamFailure:
    return UpstreamFailure("status_5xx" if answer.status >= 500 else "bad_answer", f"status {answer.status}")
