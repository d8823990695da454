"""One request's way through the fleet, as decisions: what to send where next, or what to answer. Pure.

Sequential, for prefill instances that cannot be told of a transfer beforehand:

    start ──> Send(prefill) ──answer──> Send(decode, with params) ──> relayed to the client
      │             └──failed────────> Send(decode, without params)      └──failed before its first byte──> another
      └────> Send(decode): nothing to hand off                               instance, or Fail

Streamed: both are sent together with one ticket, and decode takes the KV while prefill computes it.

    start ──> Together(prefill, decode) ──decode answers──> relayed to the client, whatever prefill says from then on
                 ├──prefill answers 200──> GoOn: decode is waited for
                 ├──prefill answers 4xx──> PassOn: decode is cancelled
                 ├──prefill failed───────> Send(decode, without params), to the same instance if it is still there
                 └──decode failed────────> Send(decode), to another: with the ticket if decode never saw it and prefill
                                           goes on, else without, and prefill is cancelled

Decode has begun to answer ("begun") when there is something to pass on: the first event of a stream, or the response
to a request that is not streamed. Response headers of a stream say nothing: vLLM sends them before it has computed
anything.

Whoever runs it (exchange.py) sends what it is told and reports what happened. Every request ends with one outcome:

| outcome | means |
| --- | --- |
| handed_off | decode got the prompt's KV from prefill (or was told where it is; audit.py checks that it came) |
| local | the fleet has no prefill instances, or the one chosen does both: one instance did everything |
| skipped:REASON | not handed off: its shape (openai.py), no_prefill, no_decode, no_pair, no_params, retried |
| skipped:short, cached | nor these: decode has little or nothing to compute (policies/skipping.py) |
| prefill_failed | the prefill instance died or failed; decode computed the prompt itself |
| refused | the prefill instance refused the request (4xx): that is the client's answer; streamed: either of them did |
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from vllm_fleet.core.ids import InstanceName
from vllm_fleet.router import problem
from vllm_fleet.router.fleet_view import FleetView
from vllm_fleet.router.gauges import LoadBook
from vllm_fleet.router.openai import GenerateRequest, take_params
from vllm_fleet.router.policies.contract import Loads, Policy
from vllm_fleet.router.policies.facts import Facts
from vllm_fleet.router.policies.skipping import Skipping
from vllm_fleet.router.request_rules import RequestRules
from vllm_fleet.router.retries import RetryBudget
from vllm_fleet.router.steps import (
    SICK,
    Fail,
    FailureKind,
    GoOn,
    Mint,
    Mode,
    PassOn,
    Send,
    Step,
    Together,
)
from vllm_fleet.wire.control import Member

HANDED_OFF = "handed_off"
LOCAL = "local"
PREFILL_FAILED = "prefill_failed"
REFUSED = "refused"
NO_PARAMS = "skipped:no_params"


class Handoff:
    """Decisions for one request. Call ``start`` once, then report each thing that happened and do what comes back."""

    def __init__(
        self,
        request: GenerateRequest,
        view: FleetView,
        prefill: Policy,
        decode: Policy,
        mint: Mint | None = None,
        *,
        facts: Facts | None = None,
        loads: Loads | None = None,
        skipping: Skipping = Skipping(),  # noqa: B008  a constant
        rules: RequestRules = RequestRules(),  # noqa: B008  a constant
        budget: RetryBudget | None = None,
        avoid: Collection[str] = (),
    ) -> None:
        """Without ``mint`` every handoff is sequential.

        Args:
            budget: retries that sick instances may cause; without one, as many as a request may make.
            avoid: instances that failed this request before; only asked when nobody else is there.
        """
        self._rules, self._budget, self._attempts = rules, budget, 0
        self._facts = Facts(request, {}) if facts is None else facts
        self._loads = LoadBook(view.in_flight) if loads is None else loads
        self._skipping = skipping
        self.request = request
        self._view = view
        self._prefill_policy, self._decode_policy, self._mint = prefill, decode, mint
        self._params: bytes | None = None
        self._tried: set[str] = set(avoid)
        self._lost: set[str] = set(avoid)
        self._busy: set[str] = set()
        self._begun = False
        self.mode: Mode = "sequential"
        self.prefill: Member | None = None
        self.decode: Member | None = None
        self.outcome = LOCAL

    @property
    def handed_off(self) -> bool:
        """Whether the request now at decode carries kv_transfer_params."""
        return self.outcome == HANDED_OFF

    @property
    def retries(self) -> int:
        """Times it was asked for again because an instance failed."""
        return max(0, self._attempts - 1)

    def start(self, now: float) -> Step:
        """The first step."""
        self.outcome, pairs = self._plan(now)
        if not pairs:
            return self._next_decode(now)
        holder = self._holder(now)
        if holder is not None:
            self.outcome = "skipped:cached"
            return self._send_decode(holder)
        chosen = self._choose(self._prefill_policy, pairs, now)
        if chosen.role == "both":
            return self._send_decode(chosen)
        self.prefill = chosen
        if self._mint is None or not chosen.workers:
            return self._send("prefill", chosen, self.request.prefill_body())
        self.mode, self.outcome = "streamed", HANDED_OFF
        hold, self._params = self._mint(chosen)
        decode = self._next_decode(now)
        assert isinstance(decode, Send), "a prefill was chosen that no decode fits"
        return Together(self._send("prefill", chosen, self.request.prefill_body(hold)), decode)

    def _plan(self, now: float) -> tuple[str, list[Member]]:
        """The outcome if nothing is handed off, and who could compute the prompt if something is."""
        decodes = self._view.decodes(now)
        if self._tried:
            decodes = [member for member in decodes if member.name not in self._tried]
        if not decodes:
            return "skipped:no_decode", []
        if not self._view.splits():
            return LOCAL, []
        if self.request.skip is not None:
            return f"skipped:{self.request.skip}", []
        if self._skipping.short(self._facts):
            return "skipped:short", []
        prefills = self._view.prefills(now)
        if all(member.role == "both" for member in prefills):
            return "skipped:no_prefill", []
        pairs = [one for one in prefills if one.role == "both" or any(self._view.fits(one, other) for other in decodes)]
        if all(member.role == "both" for member in pairs):
            return "skipped:no_pair", []
        return LOCAL, pairs

    def on_prefill_answer(self, status: int, body: bytes, now: float) -> Step:
        """The prefill instance answered in full."""
        if self._begun:
            return GoOn()
        if 400 <= status < 500:
            self.outcome, self.decode = REFUSED, None
            return PassOn()
        if status != 200:
            return self.on_prefill_failure(now)
        if self.mode == "streamed":
            return GoOn()
        self._params = take_params(body)
        self.outcome = HANDED_OFF if self._params is not None else NO_PARAMS
        return self._next_decode(now)

    def on_prefill_failure(self, now: float) -> Step:
        """The prefill instance died, hung up or failed: decode computes the prompt itself."""
        if self._begun:
            return GoOn()
        self._params, self.outcome = None, PREFILL_FAILED
        waiting = self.decode
        if waiting is not None and waiting in self._view.decodes(now):
            self._attempts -= 1  # it did not fail: being asked anew is no second try
            return self._send_decode(waiting)
        return self._next_decode(now)

    def on_decode_begun(self) -> None:
        """The decode instance has begun to answer."""
        self._begun = True

    def on_decode_failure(self, kind: FailureKind, now: float) -> Step:
        """The decode instance failed before the first byte of its answer went to the client."""
        assert self.decode is not None, "a decode failed that was never sent"
        if kind != "refused":
            # It may have used the ticket, which is good for one use; and it may still be alive, which a second try
            # at the same instance (a connection it closed while idle, say) then finds out.
            self._lost.add(self.decode.name)
            if self._params is not None:
                self._params, self.outcome = None, "skipped:retried"
        failed = self.decode
        if not self._may_retry(kind, now):
            return Fail(problem.upstream_died(failed.name))
        step = self._next_decode(now)
        return Fail(problem.upstream_died(failed.name)) if isinstance(step, Fail) else step

    def on_decode_status(self, status: int, now: float, *, busy: bool = False) -> Step:
        """The decode instance answered with an error; a 5xx is tried elsewhere, if there is an elsewhere.

        ``busy``: 503 with Retry-After; it did no work, and says so in time: going elsewhere is free.
        """
        assert self.decode is not None, "a decode answered that was never sent"
        if busy:
            self._attempts -= 1
            self._busy.add(self.decode.name)
        if status < 500 or not self.elsewhere(now) or not self._may_retry("busy" if busy else "status_5xx", now):
            if status < 500 and self.handed_off and self.mode == "streamed":
                self.outcome = REFUSED
            self._begun = True
            return PassOn()
        self._lost.add(self.decode.name)
        if self._params is not None and not busy:
            self._params, self.outcome = None, "skipped:retried"
        return self._next_decode(now)

    def elsewhere(self, now: float) -> bool:
        """Whether an instance that this request was not sent to could answer it."""
        return any(member.name not in self._tried for member in self._view.decodes(now))

    def _may_retry(self, kind: FailureKind, now: float) -> bool:
        if self._attempts >= self._rules.attempts_max:
            return False
        return kind not in SICK or self._budget is None or self._budget.take(now)

    def _next_decode(self, now: float) -> Step:
        """Send to the best instance left: untried ones first, prefill instances when nobody else is there."""
        decodes = self._view.decodes(now)
        fresh = [member for member in decodes if member.name not in self._tried]
        if self._params is not None and self.prefill is not None:
            pairs = [member for member in fresh if self._view.fits(self.prefill, member)]
            if pairs:
                return self._send_decode(self._choose(self._decode_policy, pairs, now))
            self._params, self.outcome = None, "skipped:no_pair"
        last_resort = [member for member in self._view.ready(now) if member.name not in self._tried]
        again = [member for member in decodes if member.name in self._lost and member.name not in self._busy]
        # A connection may have failed because this router was busy: better to ask again than to give up.
        left_alone = [member for member in self._view.left_alone(now) if member.role != "prefill"]
        for members in (fresh, last_resort, again, left_alone):
            if members:
                return self._send_decode(self._choose(self._decode_policy, members, now))
        return Fail(problem.no_instance())

    def _send_decode(self, member: Member) -> Send:
        self._tried.add(member.name)
        self._attempts += 1
        self.decode, self._begun = member, False
        params = self._params
        body = self.request.local_body() if params is None else self.request.decode_body(params)
        return self._send("decode", member, body)

    def _send(self, stage: Literal["prefill", "decode"], member: Member, body: bytes) -> Send:
        return Send(stage, member, body, self._facts.label, self.request.route.value)

    def _holder(self, now: float) -> Member | None:
        """The decode instance that would be chosen, if it holds too much of the prompt for a handoff to be worth it."""
        if not self._decode_policy.knows_prefixes:
            return None
        decodes = [member for member in self._view.decodes(now) if member.name not in self._tried]
        offered = self._view.offered(decodes, now, self._rules.instance_requests_max)
        by_name = {InstanceName(member.name): member for member in offered}
        name = self._decode_policy.choose(tuple(by_name), self._loads, self._facts)
        if name is None or not self._skipping.cached(self._facts, self._decode_policy.held(name, self._facts)):
            return None
        self._decode_policy.sent(name, self._facts)
        return by_name[name]

    def _choose(self, policy: Policy, members: list[Member], now: float) -> Member:
        offered = self._view.offered(members, now, self._rules.instance_requests_max)
        by_name = {InstanceName(member.name): member for member in offered}
        chosen = policy.choose(tuple(by_name), self._loads, self._facts)
        assert chosen is not None, f"policy {policy.name} chose nobody of {len(members)}"
        policy.sent(chosen, self._facts)
        return by_name[chosen]
