"""Runs requests: does what each one's Handoff decides, and owns the tasks that this takes. Knows no sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import TypeVar

from vllm_fleet.core import limits, log
from vllm_fleet.core.env import Env
from vllm_fleet.router import problem
from vllm_fleet.router.asking import Asking, PrefillAnswer
from vllm_fleet.router.audit import Audit
from vllm_fleet.router.call import Call
from vllm_fleet.router.fleet_view import FleetView
from vllm_fleet.router.handoff import Handoff
from vllm_fleet.router.metrics import Metrics
from vllm_fleet.router.openai import GenerateRequest
from vllm_fleet.router.policies.contract import Loads, Policy
from vllm_fleet.router.policies.facts import Facts
from vllm_fleet.router.policies.skipping import Skipping
from vllm_fleet.router.problem import Problem
from vllm_fleet.router.relay import Relay
from vllm_fleet.router.reply import Reply, Sink
from vllm_fleet.router.request_rules import RequestRules
from vllm_fleet.router.retries import RetryBudget
from vllm_fleet.router.steps import SICK, Cut, Fail, GoOn, Mint, PassOn, Send, Step, Together
from vllm_fleet.router.turns import Turns
from vllm_fleet.router.upstream import Upstream, UpstreamFailure
from vllm_fleet.router.waits import Ended, Wait, Waits
from vllm_fleet.wire.control import News

_LAST_WORD_S = 1.0  # for the error at the end of a request whose time is over
_TURNED_AWAY = "turned_away"

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
        loads: Loads | None = None,
        skipping: Skipping = Skipping(),  # noqa: B008  a constant
        rules: RequestRules = RequestRules(),  # noqa: B008  a constant
    ) -> None:
        """Without ``mint`` every handoff is sequential."""
        self._view, self._metrics, self._env, self._rules = view, metrics, env, rules
        self._prefill_policy, self._decode_policy, self._mint = prefill_policy, decode_policy, mint
        self._loads, self._skipping = loads, skipping
        self._waits = Waits(env)
        self._asking = Asking(view, upstream, audit, metrics, env, self._waits, rules)
        self._budget = RetryBudget(rules.retry_budget, env.now())
        self._turns = Turns(view, rules, env, self._waits)
        metrics.waiting = lambda: self._turns.waiting
        self._live: dict[Wait, None] = {}
        self._late: set[asyncio.Task[_Found]] = set()
        self.stopping = False
        self.idle = asyncio.Event()
        """Set while no request runs."""
        self.idle.set()

    @property
    def live(self) -> int:
        """Requests running now, and those that wait for their turn."""
        return len(self._live)

    @property
    def running(self) -> int:
        """Of these, those that instances work on."""
        return self._turns.running

    def apply(self, event: News) -> None:
        """Take over what the controller says; requests at instances that are gone go on elsewhere at once."""
        self._asking.gone(self._view.apply(event, self._env.now()))
        self._turns.call()

    def stop(self, seconds: float) -> None:
        """Let running requests go on for ``seconds``, then end them with an error; whoever listens refuses new ones."""
        self.stopping = True
        end = self._env.now() + seconds
        for wait in self._live:
            wait.at = min(wait.at, end)
        self._waits.look()

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
        relay = Relay(call.request, self._rules.resume)
        handoff = self._handoff(call, relay.request, Facts(call.request, call.headers))
        reply = Reply(sink, handoff, self._metrics, self._env, call)
        wait = Wait(self._waits, call.deadline.at)
        placed = False
        self._live[wait] = None
        self.idle.clear()
        try:
            with wait:
                placed = self._turns.enter() or await self._turn(call, handoff, reply)
                if placed:
                    await self._steps(call, handoff, reply, relay)
        except Ended:
            seconds = call.deadline.at - call.deadline.began
            await _give_up(reply, problem.stopping() if self.stopping else problem.deadline(seconds))
        finally:
            if placed:
                self._turns.leave()
            del self._live[wait]
            if not self._live:
                self.idle.set()
            self._metrics.handoffs.labels(handoff.outcome).inc()
            if not relay.resumes:
                call.timeline.took_part(handoff)
            call.timeline.end(handoff.outcome, reply.status, self._env.now())
        return reply.status or 500

    async def _turn(self, call: Call, handoff: Handoff, reply: Reply) -> bool:
        """Wait for a place. Returns whether there is one; if not, the client has been told."""
        if await self._turns.wait(call):
            return True
        handoff.outcome = _TURNED_AWAY
        self._metrics.turned_away.inc()
        await reply.end_with(problem.too_many(self._turns.retry_after_s()))
        return False

    def _handoff(self, call: Call, request: GenerateRequest, facts: Facts, avoid: Iterable[str] = ()) -> Handoff:
        self._budget.request(self._env.now())
        return Handoff(
            request,
            self._view,
            self._prefill_policy,
            self._decode_policy,
            self._mint,
            facts=facts,
            loads=self._loads,
            skipping=self._skipping,
            rules=self._rules,
            budget=self._budget,
            avoid=tuple(avoid),
        )

    async def _steps(self, call: Call, handoff: Handoff, reply: Reply, relay: Relay) -> None:
        now: Handoff | None = handoff
        while now is not None:
            step = await self._tries(call, now, reply, relay)
            now = None
            if isinstance(step, Cut):
                now = await self._resumed(call, step, reply, relay)
            elif isinstance(step, Fail):
                await reply.end_with(step.problem)

    async def _tries(self, call: Call, handoff: Handoff, reply: Reply, relay: Relay) -> Step:
        step = handoff.start(self._env.now())
        while isinstance(step, Send | Together):
            call.timeline.took_part(handoff)
            if isinstance(step, Together):
                step = await self._together(call, handoff, step, reply, relay)
            elif step.stage == "prefill":
                step = await self._prefill_first(call, handoff, step, reply)
            else:
                step = await self._decode(call, handoff, step, reply, relay)
        if handoff.retries:
            self._metrics.retries.inc(handoff.retries)
            call.timeline.retries += handoff.retries
        return step

    async def _resumed(self, call: Call, cut: Cut, reply: Reply, relay: Relay) -> Handoff | None:
        """A stream broke in the middle: who goes on with it. None: nobody, and the client has been told."""
        found = relay.plan()
        if not isinstance(found, str) and cut.kind in SICK and not self._budget.take(self._env.now()):
            found = "budget"
        if isinstance(found, str):
            self._metrics.resumes.labels("none").inc()
            log.event("stream.broken", instance=cut.member.name, why=found, request=call.request_id)
            await reply.end_with(problem.stream_broke(cut.member.name))
            return None
        self._metrics.resumes.labels(found.way).inc()
        log.event("stream.resumed", lost=cut.member.name, way=found.way, tokens=found.base, request=call.request_id)
        if found.way == "finish":
            await reply.part(200, (), relay.ending())
            return None
        relay.resume(found, cut.member.name)
        call.timeline.resumes = relay.resumes
        return self._handoff(call, found.request, Facts(found.request, call.headers), relay.avoid)

    async def _decode(self, call: Call, handoff: Handoff, send: Send, reply: Reply, relay: Relay) -> Step:
        name = send.member.name
        self._view.begin(name, self._env.now())
        try:
            return await self._asking.decode(call, handoff, send, reply, relay)
        finally:
            self._view.end(name)

    async def _prefill_first(self, call: Call, handoff: Handoff, send: Send, reply: Reply) -> Step:
        name = send.member.name
        self._view.begin(name, self._env.now())
        try:
            found = await self._asking.prefill(call, send)
        finally:
            self._view.end(name)
        step = self._asking.judge(call, handoff, send, found)
        return await _passed_on(step, send, found, reply)

    async def _together(self, call: Call, handoff: Handoff, both: Together, reply: Reply, relay: Relay) -> Step:
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
                decode = self._spawn(call, step, self._asking.decode(call, handoff, step, reply, relay))
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
            if isinstance(step, PassOn) and reply.status == 200 and not prefill.done():
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
        self._view.begin(name, self._env.now())
        task = asyncio.create_task(work, name=f"{send.stage} {call.request_id}")
        task.add_done_callback(lambda _: self._view.end(name))
        return task


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
