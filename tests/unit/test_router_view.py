"""Who gets a request: the view, the policy, and the decisions of a handoff, without a socket."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from vllm_fleet.core import limits
from vllm_fleet.router.fleet_view import FleetView, compatible, fleet_health
from vllm_fleet.router.handoff import Handoff
from vllm_fleet.router.openai import Route, parse_request
from vllm_fleet.router.policies.least_load import LeastLoad
from vllm_fleet.router.retries import RetryBudget
from vllm_fleet.router.steps import Fail, GoOn, PassOn, Send, Together
from vllm_fleet.wire.control import Change, Desired, Member, Slot, Snapshot, State
from vllm_fleet.wire.names import Role
from vllm_fleet.wire.ticket import WorkerAddress

ANSWER = b'{"kv_transfer_params":{"fleet_ticket":"x"}}'


def member(name: str, role: Role, state: State = "ready", life: int = 1, **fingerprint: str) -> Member:
    return Member(name, role, f"http://{name}:1", 1, f"{name}-{life}", life, state, fingerprint)


def view_of(*members: Member) -> FleetView:
    view = FleetView()
    view.apply(Snapshot("c", 10, members), 0.0)
    return view


def with_workers(one: Member) -> Member:
    """A prefill instance that can be told of a transfer beforehand."""
    return msgspec.structs.replace(one, workers=(WorkerAddress("127.0.0.1", 5000),))


def names(members: list[Member]) -> list[str]:
    return [one.name for one in members]


def handoff(view: FleetView, **fields: Any) -> Handoff:
    body = json.dumps({"prompt": "hi", **fields}).encode()
    return Handoff(parse_request(Route.COMPLETIONS, body), view, LeastLoad(), LeastLoad(), mint)


def mint(prefill: Member) -> tuple[bytes, bytes]:
    return b'{"hold":"%s"}' % prefill.name.encode(), b'{"load":"%s"}' % prefill.name.encode()


def sent_to(step: object, stage: str) -> str:
    assert isinstance(step, Send)
    assert step.stage == stage
    return step.member.name


# The view ----------------------------------------------------------------------------------------------------------


def test_roles_and_states_decide_who_may_take_what() -> None:
    view = view_of(member("p", "prefill"), member("d", "decode"), member("b", "both"), member("s", "decode", "suspect"))
    assert names(view.prefills(0.0)) == ["b", "p"]
    assert names(view.decodes(0.0)) == ["b", "d"]


def test_changes_apply_in_order_and_once() -> None:
    view = view_of(member("d", "decode"))
    assert view.apply(Change(11, member("d", "decode", "draining")), 0.0) == set()
    assert view.apply(Change(11, member("d", "decode")), 0.0) == set()
    assert names(view.ready(0.0)) == []
    assert view.apply(Change(12, member("d", "decode", life=2)), 0.0) == {"d-1"}
    assert view.apply(Change(13, member("d", "decode", "gone", life=2)), 0.0) == {"d-2"}
    assert view.members() == ()


def test_a_role_changes_while_requests_run() -> None:
    view = view_of(member("p", "prefill"), member("d", "decode"), member("e", "decode"))
    view.begin("e")
    assert view.apply(Change(11, member("e", "prefill")), 0.0) == set(), "nothing that waits for it ends"
    assert names(view.prefills(0.0)) == ["e", "p"]
    assert names(view.decodes(0.0)) == ["d"]
    assert view.in_flight("e") == 1


def test_what_the_fleet_is_to_be_is_not_the_routers_business() -> None:
    view = view_of(member("d", "decode"))
    assert view.apply(Desired(11, (Slot("x", "both"),)), 0.0) == set()
    assert names(view.ready(0.0)) == ["d"]
    assert view.apply(Change(11, member("d", "decode", "gone")), 0.0) == set(), "of before"


def test_members_outlive_a_controller_that_forgot_them() -> None:
    view = view_of(member("p", "prefill"), member("d", "decode"))
    assert view.apply(Snapshot("other", 0, (member("p", "prefill"),)), 100.0) == set()
    assert names(view.ready(100.0)) == ["d", "p"]
    assert names(view.ready(100.0 + limits.ORPHAN_S)) == ["p"]


def test_the_same_controller_is_believed_at_once() -> None:
    view = view_of(member("p", "prefill"), member("d", "decode"))
    assert view.apply(Snapshot("c", 20, (member("p", "prefill"),)), 1.0) == {"d-1"}
    assert names(view.ready(1.0)) == ["p"]


def test_a_refusal_backs_off_and_a_change_ends_it() -> None:
    view = view_of(member("d", "decode"))
    view.mark_down(member("d", "decode"), 0.0)
    view.mark_down(member("d", "decode"), 0.1)  # the same death, seen by another request
    assert names(view.ready(0.5)) == []
    assert names(view.ready(1.0)) == ["d"]
    view.mark_down(member("d", "decode"), 1.0)
    assert names(view.ready(2.9)) == []
    view.apply(Change(11, member("d", "decode", life=2)), 1.5)
    assert names(view.ready(1.5)) == ["d"]
    view.mark_down(member("d", "decode", life=1), 1.6)
    assert names(view.ready(1.6)) == ["d"]


def test_in_flight_counts_end_at_zero() -> None:
    view = view_of(member("d", "decode"))
    view.begin("d")
    view.begin("d")
    assert view.in_flight("d") == 2
    view.end("d")
    view.end("d")
    assert view.in_flight("d") == 0
    with pytest.raises(AssertionError):
        view.end("d")


def test_only_equal_fingerprints_fit_unless_one_is_unknown() -> None:
    assert compatible(member("a", "both", model="x"), member("b", "both", model="x"))
    assert compatible(member("a", "both"), member("b", "both", model="x"))
    assert not compatible(member("a", "both", model="y"), member("b", "both", model="x"))


def test_another_tensor_parallel_size_fits_and_another_block_size_does_not() -> None:
    one = member("a", "prefill", model="x", tensor_parallel="2", block_tokens="16")
    assert compatible(one, member("b", "decode", model="x", tensor_parallel="1", block_tokens="16"))
    assert compatible(one, member("b", "decode", model="x", block_tokens="16"))
    assert not compatible(one, member("b", "decode", model="x", tensor_parallel="2", block_tokens="32"))
    assert not compatible(one, member("b", "decode", model="x", tensor_parallel="2"))


def test_health_names_what_is_missing() -> None:
    assert fleet_health(view_of(), 0.0)[0] is False
    can, facts = fleet_health(view_of(member("p", "prefill")), 0.0)
    assert can
    assert facts["status"] == "degraded"
    assert fleet_health(view_of(member("p", "prefill"), member("d", "decode")), 0.0)[1] == {
        "status": "ok",
        "prefill": 1,
        "decode": 1,
        "both": 0,
    }


# The handoff -------------------------------------------------------------------------------------------------------


def test_prefill_then_decode() -> None:
    run = handoff(view_of(member("p", "prefill"), member("d", "decode")))
    assert sent_to(run.start(0.0), "prefill") == "p"
    step = run.on_prefill_answer(200, ANSWER, 1.0)
    assert sent_to(step, "decode") == "d"
    assert isinstance(step, Send)
    assert json.loads(step.body) == {"prompt": "hi", "kv_transfer_params": {"fleet_ticket": "x"}}
    assert run.outcome == "handed_off"


@pytest.mark.parametrize(
    ("members", "fields", "first", "outcome"),
    [
        ([member("d", "decode"), member("b", "both")], {}, "b", "local"),
        ([member("p", "prefill"), member("d", "decode")], {"n": 2}, "d", "skipped:n"),
        ([member("p", "prefill", "suspect"), member("d", "decode")], {}, "d", "skipped:no_prefill"),
        ([member("p", "prefill", m="1"), member("d", "decode", m="2")], {}, "d", "skipped:no_pair"),
        ([member("p", "prefill"), member("d", "decode", "gone")], {}, "p", "skipped:no_decode"),
    ],
)
def test_when_nothing_is_handed_off(members: list[Member], fields: dict[str, Any], first: str, outcome: str) -> None:
    run = handoff(view_of(*members), **fields)
    assert sent_to(run.start(0.0), "decode") == first
    assert run.outcome == outcome


def test_nobody_there() -> None:
    step = handoff(view_of(member("d", "decode", "starting"))).start(0.0)
    assert isinstance(step, Fail)
    assert step.problem.status == 503


def test_only_a_fitting_decode_gets_the_ticket() -> None:
    run = handoff(view_of(member("p", "prefill", m="2"), member("d1", "decode", m="1"), member("d2", "decode", m="2")))
    run.start(0.0)
    assert sent_to(run.on_prefill_answer(200, ANSWER, 0.0), "decode") == "d2"


@pytest.mark.parametrize(
    ("status", "answer", "outcome"),
    [(500, b"", "prefill_failed"), (302, b"", "prefill_failed"), (200, b"{}", "skipped:no_params")],
)
def test_a_failed_prefill_leaves_the_prompt_to_decode(status: int, answer: bytes, outcome: str) -> None:
    run = handoff(view_of(member("p", "prefill"), member("d", "decode")))
    run.start(0.0)
    step = run.on_prefill_answer(status, answer, 0.0)
    assert isinstance(step, Send)
    assert json.loads(step.body) == {"prompt": "hi"}
    assert run.outcome == outcome


def test_a_refusal_by_prefill_is_the_answer() -> None:
    run = handoff(view_of(member("p", "prefill"), member("d", "decode")))
    run.start(0.0)
    assert run.on_prefill_answer(400, b"{}", 0.0) == PassOn()
    assert run.outcome == "refused"


def test_a_decode_that_never_saw_the_ticket_leaves_it_good() -> None:
    run = handoff(view_of(member("p", "prefill"), member("d1", "decode"), member("d2", "decode")))
    run.start(0.0)
    run.on_prefill_answer(200, ANSWER, 0.0)
    step = run.on_decode_failure("refused", 0.0)
    assert isinstance(step, Send)
    assert b"kv_transfer_params" in step.body
    assert run.outcome == "handed_off"


def test_a_decode_that_may_have_used_the_ticket_spoils_it() -> None:
    run = handoff(view_of(member("p", "prefill"), member("d1", "decode"), member("d2", "decode")))
    run.start(0.0)
    run.on_prefill_answer(200, ANSWER, 0.0)
    step = run.on_decode_failure("disconnected", 0.0)
    assert sent_to(step, "decode") == "d2"
    assert isinstance(step, Send)
    assert b"kv_transfer_params" not in step.body
    assert run.outcome == "skipped:retried"


def test_retries_end() -> None:
    view = view_of(*(member(f"d{number}", "decode") for number in range(9)))
    run = handoff(view)
    step = run.start(0.0)
    sends = 0
    while isinstance(step, Send):
        sends += 1
        step = run.on_decode_failure("disconnected", 0.0)
    assert sends == limits.DECODE_ATTEMPTS_MAX
    assert isinstance(step, Fail)
    assert step.problem.status == 502


def test_prefill_answers_when_the_only_decode_dies() -> None:
    run = handoff(view_of(member("p", "prefill"), member("d", "decode")))
    run.start(0.0)
    run.on_prefill_answer(200, ANSWER, 0.0)
    assert sent_to(run.on_decode_failure("disconnected", 0.0), "decode") == "p"


def test_an_instances_own_5xx_is_tried_elsewhere_while_there_is_an_elsewhere() -> None:
    run = handoff(view_of(member("d1", "decode"), member("d2", "decode")))
    run.start(0.0)
    assert isinstance(run.on_decode_status(500, 0.0), Send)
    assert run.on_decode_status(500, 0.0) == PassOn()


def test_5xx_end_with_the_attempts() -> None:
    run = handoff(view_of(*(member(f"d{number}", "decode") for number in range(9))))
    run.start(0.0)
    steps = [run.on_decode_status(500, 0.0) for _ in range(limits.DECODE_ATTEMPTS_MAX)]
    assert [type(step) for step in steps] == [Send] * (limits.DECODE_ATTEMPTS_MAX - 1) + [PassOn]


def test_going_elsewhere_because_an_instance_is_busy_is_free() -> None:
    run = handoff(view_of(*(member(f"d{number}", "decode") for number in range(9))))
    asked = {sent_to(run.start(0.0), "decode")}
    for _ in range(8):
        asked.add(sent_to(run.on_decode_status(503, 0.0, busy=True), "decode"))
    assert len(asked) == 9
    assert run.on_decode_status(503, 0.0, busy=True) == PassOn()
    assert run.retries == 0


def test_whoever_broke_a_stream_off_is_the_last_to_be_asked_to_go_on() -> None:
    request = parse_request(Route.COMPLETIONS, b'{"prompt":"hi"}')
    view = view_of(member("d1", "decode"), member("d2", "decode"))
    for avoid, chosen in ((("d1",), "d2"), (("d2",), "d1"), (("d1", "d2"), "d1")):
        run = Handoff(request, view, LeastLoad(), LeastLoad(), mint, avoid=avoid)
        assert sent_to(run.start(0.0), "decode") == chosen


def test_sick_instances_use_up_the_budget_and_deaths_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RETRIES_FREE", 1)
    request, budget = parse_request(Route.COMPLETIONS, b'{"prompt":"hi"}'), RetryBudget(0.0)
    view = view_of(*(member(f"d{number}", "decode") for number in range(9)))

    def begun() -> Handoff:
        run = Handoff(request, view, LeastLoad(), LeastLoad(), mint, budget=budget)
        run.start(0.0)
        return run

    assert isinstance(begun().on_decode_status(500, 0.0), Send)
    assert begun().on_decode_status(500, 0.0) == PassOn()
    assert isinstance(begun().on_decode_failure("stalled", 0.0), Fail)
    assert isinstance(begun().on_decode_failure("disconnected", 0.0), Send)
    assert isinstance(begun().on_decode_failure("refused", 0.0), Send)


def test_an_error_of_the_client_is_not_tried_elsewhere() -> None:
    run = handoff(view_of(member("d1", "decode"), member("d2", "decode")))
    run.start(0.0)
    assert run.on_decode_status(400, 0.0) == PassOn()


# The handoff, streamed ---------------------------------------------------------------------------------------------


def streamed(*decodes: Member) -> tuple[Handoff, FleetView]:
    """A handoff that has been started, both requests sent."""
    view = view_of(with_workers(member("p", "prefill")), *decodes)
    run = handoff(view)
    assert isinstance(run.start(0.0), Together)
    return run, view


def test_prefill_and_decode_together_with_one_ticket() -> None:
    fits, other = member("d2", "decode", m="2"), member("d1", "decode", m="1")
    run = handoff(view_of(with_workers(member("p", "prefill", m="2")), fits, other))
    step = run.start(0.0)
    assert isinstance(step, Together)
    assert (sent_to(step.prefill, "prefill"), sent_to(step.decode, "decode")) == ("p", "d2")
    assert json.loads(step.prefill.body)["kv_transfer_params"] == {"hold": "p"}
    assert json.loads(step.decode.body)["kv_transfer_params"] == {"load": "p"}
    assert (run.outcome, run.mode) == ("handed_off", "streamed")
    assert run.on_prefill_answer(200, b"", 0.0) == GoOn()


def test_without_a_mint_or_workers_prefill_comes_first() -> None:
    known = member("p", "prefill"), member("d", "decode")
    assert sent_to(handoff(view_of(*known)).start(0.0), "prefill") == "p"
    request = parse_request(Route.COMPLETIONS, b'{"prompt":"hi"}')
    run = Handoff(request, view_of(with_workers(known[0]), known[1]), LeastLoad(), LeastLoad())
    assert sent_to(run.start(0.0), "prefill") == "p"
    assert run.mode == "sequential"


@pytest.mark.parametrize("status", [200, 302, 400, 503])
def test_once_decode_has_begun_prefill_does_not_matter(status: int) -> None:
    run, _ = streamed(member("d", "decode"))
    run.on_decode_begun()
    assert run.on_prefill_answer(status, b"", 0.0) == GoOn()
    assert run.on_prefill_failure(0.0) == GoOn()
    assert run.outcome == "handed_off"


def test_a_refusal_by_either_is_the_answer() -> None:
    run, _ = streamed(member("d", "decode"))
    assert run.on_prefill_answer(422, b"", 0.0) == PassOn()
    assert (run.outcome, run.decode) == ("refused", None)
    run, _ = streamed(member("d", "decode"))
    assert run.on_decode_status(422, 0.0) == PassOn()
    assert run.outcome == "refused"
    assert run.on_prefill_answer(400, b"", 0.0) == GoOn()  # decode's refusal is on its way to the client


def test_after_a_failed_prefill_the_same_decode_is_asked_and_may_still_fail() -> None:
    run, _ = streamed(*(member(f"d{number}", "decode") for number in range(9)))
    step = run.on_prefill_answer(500, b"", 0.0)
    assert sent_to(step, "decode") == "d0"
    assert isinstance(step, Send)
    assert json.loads(step.body) == {"prompt": "hi"}
    assert run.outcome == "prefill_failed"
    sends = 0
    while isinstance(step, Send):
        sends += 1
        step = run.on_decode_failure("disconnected", 0.0)
    assert sends == limits.DECODE_ATTEMPTS_MAX
    assert run.outcome == "prefill_failed"


def test_after_a_failed_prefill_a_decode_that_left_is_not_asked() -> None:
    run, view = streamed(member("d1", "decode"), member("d2", "decode"))
    view.apply(Change(11, member("d1", "decode", "suspect")), 0.0)
    assert sent_to(run.on_prefill_failure(0.0), "decode") == "d2"


@pytest.mark.parametrize(
    ("kind", "outcome", "ticket"), [("refused", "handed_off", True), ("disconnected", "skipped:retried", False)]
)
def test_the_ticket_stays_good_while_no_decode_has_seen_it(kind: Any, outcome: str, ticket: bool) -> None:
    run, _ = streamed(member("d1", "decode"), member("d2", "decode"))
    step = run.on_decode_failure(kind, 0.0)
    assert sent_to(step, "decode") == "d2"
    assert isinstance(step, Send)
    assert (b"kv_transfer_params" in step.body, run.outcome, run.handed_off) == (ticket, outcome, ticket)


def test_an_unstreamed_answer_that_began_and_broke_is_asked_for_elsewhere() -> None:
    run, _ = streamed(member("d1", "decode"), member("d2", "decode"))
    run.on_decode_begun()
    assert sent_to(run.on_decode_failure("disconnected", 0.0), "decode") == "d2"
    assert not run.handed_off


def test_an_instance_that_does_both_is_told_of_no_transfer() -> None:
    run = handoff(view_of(with_workers(member("b", "both")), member("p", "prefill", "suspect")))
    assert sent_to(run.start(0.0), "decode") == "b"
    assert not run.handed_off


def test_the_last_instance_is_asked_again_though_it_refused_a_connection() -> None:
    view = FleetView()
    view.apply(Snapshot("c", 1, (member("d", "decode"),)), 0.0)
    request = parse_request(Route.COMPLETIONS, b'{"prompt": "x", "max_tokens": 1}')
    handoff = Handoff(request, view, LeastLoad(), LeastLoad())
    step = handoff.start(0.0)
    asked = 0
    while isinstance(step, Send):
        asked += 1
        view.mark_down(step.member, 0.0)
        assert view.decodes(0.0) == []
        step = handoff.on_decode_failure("refused", 0.0)
    assert isinstance(step, Fail)
    assert asked == limits.DECODE_ATTEMPTS_MAX
