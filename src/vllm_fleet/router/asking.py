"""One request at one instance: sends it, passes on or keeps what comes back, counts what fails. Knows no sockets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vllm_fleet.core import limits, log
from vllm_fleet.core.env import Env
from vllm_fleet.router import headers
from vllm_fleet.router.audit import Audit
from vllm_fleet.router.call import Call
from vllm_fleet.router.fleet_view import FleetView
from vllm_fleet.router.handoff import NO_PARAMS, Handoff
from vllm_fleet.router.metrics import Metrics
from vllm_fleet.router.relay import Relay
from vllm_fleet.router.reply import Reply
from vllm_fleet.router.request_rules import RequestRules
from vllm_fleet.router.resume_join import Mismatch
from vllm_fleet.router.sse import EventStream
from vllm_fleet.router.steps import Cut, FailureKind, PassOn, Send, Step
from vllm_fleet.router.upstream import Upstream, UpstreamAnswer, UpstreamFailure
from vllm_fleet.router.waits import NEVER, Ended, Wait, Waits


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


class _Try(Wait):
    """The wait for one instance. It ends when the instance is gone, or silent too long while another could answer."""

    __slots__ = ("_handoff", "incarnation", "kind", "limit_s")

    def __init__(self, owner: Waits, incarnation: str, handoff: Handoff | None = None) -> None:
        super().__init__(owner)
        self.incarnation, self._handoff = incarnation, handoff
        self.kind: FailureKind = "slow"
        self.limit_s = NEVER

    def arm(self, kind: FailureKind, limit_s: float, now: float) -> None:
        """Silence from now on for ``limit_s`` is a failure of this kind; 0: never."""
        self.kind, self.limit_s = kind, limit_s or NEVER
        self.at = now + self.limit_s

    def due(self, now: float) -> bool:
        if self._handoff is not None and self._handoff.elsewhere(now):
            return True
        self.at = now + self.limit_s  # nobody else could take it over: better late than never
        return False

    def failure(self) -> UpstreamFailure:
        """What the end of this wait means."""
        if self.kind == "gone":
            return UpstreamFailure("gone", "the controller says that it is gone")
        what = "no first byte" if self.kind == "slow" else "silent in the middle of a stream"
        return UpstreamFailure(self.kind, f"{what} for {self.limit_s:g} s")


class Asking:
    """All that one router asks of instances. Belongs to one event loop."""

    def __init__(
        self,
        view: FleetView,
        upstream: Upstream,
        audit: Audit,
        metrics: Metrics,
        env: Env,
        waits: Waits,
        rules: RequestRules,
    ) -> None:
        self._view, self._upstream, self._env = view, upstream, env
        self._audit, self._metrics = audit, metrics
        self._waits, self._rules = waits, rules
        self._throttle = Throttle()

    def gone(self, incarnations: Iterable[str]) -> None:
        """The controller says that these ended: whoever waits for one of them is told at once."""
        ended = set(incarnations)
        if not ended:
            return
        for wait in self._waits.all():
            if isinstance(wait, _Try) and wait.incarnation in ended and not wait.fired:
                wait.kind = "gone"
                wait.fire()

    async def prefill(self, call: Call, send: Send) -> PrefillAnswer | UpstreamFailure:
        """Ask a prefill instance; its answer is here in full, or it failed, which has been counted and logged."""
        began = self._env.now()
        call.timeline.mark("prefill_sent", began)
        self._metrics.meters.sent("prefill", send.member.name)
        wanted = headers.to_instance(call.headers, f"{call.inner_id}-p", send.label)
        if call.timeline.trace is not None:
            call.timeline.trace.send(wanted, "prefill", send.member.name, began - call.began)
        wait = _Try(self._waits, send.member.incarnation)
        try:
            with wait:
                async with self._upstream.post(send.member.url + send.path, wanted, send.body) as answer:
                    body = await answer.read(limits.PREFILL_ANSWER_BYTES_MAX)
        except Ended:
            return self._failed(call, send, wait.failure())
        except UpstreamFailure as failure:
            return self._failed(call, send, failure)
        now = self._env.now()
        self._metrics.prefill.observe(now - began)
        call.timeline.mark("prefill_answered", now)
        if answer.status != 200 and not 400 <= answer.status < 500:
            self._failed(call, send, _bad_status(answer))
        else:
            self._view.mark_up(send.member.name, now)
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

    async def decode(self, call: Call, handoff: Handoff, send: Send, reply: Reply, relay: Relay) -> Step:
        """Ask a decode instance and pass its answer on.

        Returns:
            Cut: it broke after the client had got a part, and nothing was said to the client about that.

        Raises:
            ClientGone: nobody takes the answer any more.
        """
        began = self._env.now()
        self._metrics.meters.sent("decode", send.member.name)
        wanted = headers.to_instance(call.headers, call.inner_id, send.label)
        if call.timeline.trace is not None:
            call.timeline.trace.send(wanted, "decode", send.member.name, began - call.began)
        judged = handoff.handed_off and self._audit.known(send.member.name)
        call.timeline.mark("decode_sent", began)
        relay.begin()
        wait = _Try(self._waits, send.member.incarnation, handoff)
        if relay.streaming:
            wait.arm("slow", self._rules.first_byte_s, began)
        try:
            with wait:
                async with self._upstream.post(send.member.url + send.path, wanted, send.body) as answer:
                    if answer.status >= 400:
                        return await self._decode_error(call, handoff, send, answer, reply)
                    if answer.status >= 300:
                        raise _bad_status(answer)
                    if headers.content_type(answer.headers) == "text/event-stream":
                        await self._relay_stream(send, answer, handoff, reply, relay, wait)
                    else:
                        self._view.mark_up(send.member.name, self._env.now())
                        await _relay_whole(answer, handoff, reply)
            return PassOn()
        except Ended:
            failure = wait.failure()
        except UpstreamFailure as found:
            failure = found
        except Mismatch as found:
            failure = UpstreamFailure("bad_answer", str(found))
        finally:
            if judged and reply.status is not None and reply.status < 300:
                self._audit.sent(send.member.name, self._env.now())
        if relay.complete:  # the client has all of it
            return PassOn()
        self._failed(call, send, failure)
        if reply.started:
            return Cut(failure.kind, send.member)
        return handoff.on_decode_failure(failure.kind, self._env.now())

    async def _decode_error(
        self, call: Call, handoff: Handoff, send: Send, answer: UpstreamAnswer, reply: Reply
    ) -> Step:
        retry_after_s = _retry_after_s(answer) if answer.status == 503 else None
        body = await answer.read(limits.ERROR_BODY_BYTES_MAX)
        now = self._env.now()
        if answer.status < 500:
            self._view.mark_up(send.member.name, now)
        elif retry_after_s is not None:
            self._view.leave_alone(send.member, now + min(retry_after_s, limits.BACKOFF_MAX_S))
            self._metrics.failures.labels(send.stage, "busy").inc()
        else:
            self._failed(call, send, _bad_status(answer))
        if reply.started:  # of a stream that was to be resumed here
            return Cut("busy" if retry_after_s is not None else "status_5xx", send.member)
        step = handoff.on_decode_status(answer.status, now, busy=retry_after_s is not None)
        if isinstance(step, PassOn):
            await reply.error(answer.status, answer.headers, body, send.member.name)
        return step

    async def _relay_stream(
        self, send: Send, answer: UpstreamAnswer, handoff: Handoff, reply: Reply, relay: Relay, wait: _Try
    ) -> None:
        """Pass events on as they come."""
        events = EventStream()
        heard = False
        stall_s = self._rules.stall_s or NEVER
        async for chunk in answer.chunks():
            whole = events.feed(chunk)
            if not whole:
                continue
            data = relay.take(whole)
            relay.complete = events.done and relay.error is None
            now = self._env.now()
            if not heard:
                heard = True
                self._view.mark_up(send.member.name, now)
                wait.kind, wait.limit_s = "stalled", stall_s
            if data:
                handoff.on_decode_begun()
                wait.at = NEVER  # a client that reads slowly is not the instance's fault
                await reply.part(answer.status, answer.headers, data)
                now = self._env.now() if stall_s < NEVER else now
            wait.at = now + stall_s
            if relay.error is not None:  # what came before it is the client's
                raise UpstreamFailure("status_5xx", f"an error in the stream: {relay.error.type[:64]}")
        rest = events.rest()
        if rest and (events.done or not relay.followed):  # half an event must not come before its second half
            handoff.on_decode_begun()
            await reply.part(answer.status, answer.headers, relay.take(rest))
        if not events.done:
            raise UpstreamFailure("disconnected", "the stream ended before [DONE]")

    def _failed(self, call: Call, send: Send, failure: UpstreamFailure) -> UpstreamFailure:
        self._metrics.failures.labels(send.stage, failure.kind).inc()
        now = self._env.now()
        if call.timeline.trace is not None:
            call.timeline.trace.failed(send.stage, send.member.name, failure.kind, now - call.began)
        if failure.kind not in ("gone", "too_large"):
            refused = failure.kind == "refused"
            if self._view.mark_failed(send.member, now, refused=refused):
                log.event("breaker.opened", instance=send.member.name, kind=failure.kind)
        if self._throttle.due(now, send.stage, failure.kind, send.member.name):
            log.warn(
                "upstream.failed",
                instance=send.member.name,
                stage=send.stage,
                kind=failure.kind,
                reason=failure.reason,
                request=call.request_id,
            )
        return failure


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


def _retry_after_s(answer: UpstreamAnswer) -> float | None:
    """When an instance wants to be asked again; None: it did not say so."""
    for name, value in answer.headers:
        if name.lower() == "retry-after":
            return float(value) if value.isdecimal() else float(limits.RETRY_AFTER_S)
    return None
