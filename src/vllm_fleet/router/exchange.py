"""Runs requests: does what each one's Handoff decides, and owns the tasks that this takes. Knows no sockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterable, Iterator
from typing import TypeVar

from vllm_fleet.core import limits
from vllm_fleet.core.env import Env
from vllm_fleet.router import problem
from vllm_fleet.router.asking import Asking, PrefillAnswer
from vllm_fleet.router.audit import Audit
from vllm_fleet.router.call import Call
from vllm_fleet.router.fleet_view import FleetView
from vllm_fleet.router.handoff import Fail, GoOn, Handoff, Mint, PassOn, Send, Step, Together
from vllm_fleet.router.metrics import Metrics
from vllm_fleet.router.policies.contract import Policy
from vllm_fleet.router.problem import Problem
from vllm_fleet.router.reply import Reply, Sink
from vllm_fleet.router.upstream import Upstream, UpstreamFailure
from vllm_fleet.wire.control import Member, News

_LAST_WORD_S = 1.0  # for the error at the end of a request whose time is over

_Found = PrefillAnswer | UpstreamFailure
_T = TypeVar("_T")


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
        mint: Mint | None = None,
    ) -> None:
        """Without ``mint`` every handoff is sequential."""
        self._view, self._metrics, self._env = view, metrics, env
        self._prefill_policy, self._decode_policy, self._mint = prefill_policy, decode_policy, mint
        self._asking = Asking(view, upstream, audit, metrics, env)
        self._live: set[asyncio.Timeout] = set()
        self._late: set[asyncio.Task[_Found]] = set()
        self.stopping = False
        self.idle = asyncio.Event()
        """Set while no request runs."""
        self.idle.set()

    @property
    def live(self) -> int:
        """Requests running now."""
        return len(self._live)

    def apply(self, event: News) -> None:
        """Take over what the controller says; requests at instances that are gone go on elsewhere at once."""
        self._asking.gone(self._view.apply(event, self._env.now()))

    def stop(self, seconds: float) -> None:
        """Let running requests go on for ``seconds``, then end them with an error; whoever listens refuses new ones."""
        self.stopping = True
        end = asyncio.get_running_loop().time() + seconds
        for scope in self._live:
            if not scope.expired():
                scope.reschedule(min(end, scope.when() or end))

    async def close(self) -> None:
        """End what no request waits for any more; after the last ``run``."""
        await _ended(self._late)

    async def run(self, call: Call, sink: Sink) -> int:
        """Answer one request. The client got an answer, or one typed error, or its connection was cut.

        Returns:
            The status the client was told.

        Raises:
            ClientGone: the client hung up; all work for it has been cancelled.
        """
        handoff = Handoff(call.request, self._view, self._prefill_policy, self._decode_policy, self._mint)
        reply = Reply(sink, handoff, self._metrics, self._env, call)
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
            call.timeline.took_part(handoff)
            call.timeline.end(handoff.outcome, reply.status, self._env.now())
        return reply.status or 500

    async def _steps(self, call: Call, handoff: Handoff, reply: Reply) -> None:
        step = handoff.start(self._env.now())
        while isinstance(step, Send | Together):
            call.timeline.took_part(handoff)
            if isinstance(step, Together):
                step = await self._together(call, handoff, step, reply)
            elif step.stage == "prefill":
                step = await self._prefill_first(call, handoff, step, reply)
            else:
                with self._counted(step.member):
                    step = await self._asking.decode(call, handoff, step, reply)
        if isinstance(step, Fail):
            await reply.end_with(step.problem)

    async def _prefill_first(self, call: Call, handoff: Handoff, send: Send, reply: Reply) -> Step:
        with self._counted(send.member):
            found = await self._asking.prefill(call, send)
        step = self._asking.judge(call, handoff, send, found)
        return await _passed_on(step, send, found, reply)

    async def _together(self, call: Call, handoff: Handoff, both: Together, reply: Reply) -> Step:
        """Ask prefill and decode at once; returns the first step that needs no prefill any more.

        Owns both tasks: none outlives this, but for a prefill that decode has overtaken (_let_end).
        """
        prefill = self._spawn(call, both.prefill, self._asking.prefill(call, both.prefill))
        running: set[asyncio.Task[_Found] | asyncio.Task[Step]] = {prefill}
        step: Step = both.decode
        heard = False
        try:
            while isinstance(step, Send) and handoff.handed_off:
                call.timeline.took_part(handoff)
                decode = self._spawn(call, step, self._asking.decode(call, handoff, step, reply))
                running.add(decode)
                if not heard:
                    await asyncio.wait((prefill, decode), return_when=asyncio.FIRST_COMPLETED)
                if not heard and prefill.done() and not decode.done():
                    heard, found = True, prefill.result()
                    # Nothing is awaited between this judgement and the cancelling: decode cannot begin in between.
                    news = self._asking.judge(call, handoff, both.prefill, found)
                    if not isinstance(news, GoOn):
                        await _ended((decode,))
                        return await _passed_on(news, both.prefill, found, reply)
                step = await decode
            if reply.status is not None and reply.status < 300 and not prefill.done():
                running.discard(prefill)
                self._let_end(prefill)
            return step
        finally:
            await _ended(running)

    def _let_end(self, prefill: asyncio.Task[_Found]) -> None:
        """The answer is complete before prefill has said so: let it say so, for the metrics, but not for long."""
        timer = asyncio.get_running_loop().call_later(limits.LATE_PREFILL_S, prefill.cancel)
        self._late.add(prefill)
        prefill.add_done_callback(self._late.discard)
        prefill.add_done_callback(lambda _: timer.cancel())

    def _spawn(self, call: Call, send: Send, work: Coroutine[None, None, _T]) -> asyncio.Task[_T]:
        """A task that counts as a request at its instance from now until it ends, even if it never starts."""
        name = send.member.name
        self._view.begin(name)
        task = asyncio.create_task(work, name=f"{send.stage} {call.request_id}")
        task.add_done_callback(lambda _: self._view.end(name))
        return task

    @contextlib.contextmanager
    def _counted(self, member: Member) -> Iterator[None]:
        self._view.begin(member.name)
        try:
            yield
        finally:
            self._view.end(member.name)


async def _passed_on(step: Step, send: Send, found: _Found, reply: Reply) -> Step:
    """``step``, with prefill's answer given to the client if that is what the step says."""
    if isinstance(step, PassOn) and isinstance(found, PrefillAnswer):
        await reply.error(found.status, found.headers, found.body, send.member.name)
    return step


async def _ended(tasks: Iterable[asyncio.Task[_Found] | asyncio.Task[Step]]) -> None:
    """Cancel and wait until all are over: at once, as nothing they do when cancelled waits for anything."""
    left = list(tasks)
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left)
    for task in left:
        if not task.cancelled():
            task.exception()  # read, so that asyncio does not report as lost what nobody needs any more


async def _give_up(reply: Reply, reason: Problem) -> None:
    """The request's time is over: say so, if the client takes it soon."""
    try:
        async with asyncio.timeout(_LAST_WORD_S):
            await reply.end_with(reason)
    except TimeoutError:
        reply.abort()
