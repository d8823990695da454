"""launcher.reactor: whole effect lists."""

from __future__ import annotations

import random

from vllm_fleet.launcher.events import (
    Answered,
    Began,
    Effect,
    Exited,
    Finish,
    Kill,
    Note,
    Probe,
    Ready,
    Repick,
    Start,
    StopAsked,
    Terminate,
    Tick,
)
from vllm_fleet.launcher.fleet import Child, Fleet, Rules
from vllm_fleet.launcher.keeping import ending
from vllm_fleet.launcher.reactor import step
from vllm_fleet.wire.control import Slot

SLOTS = (Slot("prefill-0", "prefill"), Slot("decode-0", "decode"))


def new(*, fixed: str = "", drain_s: float = 0.0) -> Fleet:
    children = {
        "controller": Child("controller", "controller", fixed == "controller"),
        "router": Child("router", "router", fixed == "router"),
        **{slot.name: Child(slot.name, "instance", role=slot.role) for slot in SLOTS},
    }
    rules = Rules(ready_s=100.0, stop_s=8.0, drain_s=drain_s, restarts_max=3, restart_window_s=100.0)
    return Fleet(children, rules, SLOTS, declared=True, rng=Steady())


class Steady(random.Random):
    """No jitter."""

    def random(self) -> float:
        return 0.0


def serving(drain_s: float = 0.0) -> Fleet:
    fleet = new(drain_s=drain_s)
    step(fleet, Began(), 0.0)
    for name in fleet.children:
        step(fleet, Answered(name, healthy=True), 1.0)
    assert fleet.phase == "serving"
    return fleet


def states(fleet: Fleet) -> dict[str, str]:
    return {name: child.state for name, child in fleet.children.items()}


def test_the_controller_starts_first_then_everybody_at_once() -> None:
    fleet = new()
    assert step(fleet, Began(), 0.0) == [Start("controller")]
    assert step(fleet, Tick(), 0.1) == []
    assert step(fleet, Tick(), 0.25) == [Probe("controller")]
    assert step(fleet, Tick(), 0.5) == [], "one question at a time"
    assert step(fleet, Answered("controller", healthy=False), 0.6) == []
    assert step(fleet, Tick(), 0.84) == []
    assert step(fleet, Tick(), 0.86) == [Probe("controller")]
    assert step(fleet, Answered("controller", healthy=True), 1.0) == [
        Start("router"), Start("prefill-0"), Start("decode-0"),
    ]  # fmt: skip
    assert step(fleet, Tick(), 1.3) == [Probe("router"), Probe("prefill-0"), Probe("decode-0")]
    assert step(fleet, Answered("router", healthy=True), 2.0) == []
    assert step(fleet, Answered("prefill-0", healthy=True), 2.0) == []
    assert step(fleet, Answered("decode-0", healthy=True), 2.0) == [Ready()]
    assert (fleet.phase, set(states(fleet).values())) == ("serving", {"ready"})
    assert step(fleet, Tick(), 500.0) == []
    assert step(fleet, Answered("decode-0", healthy=True), 501.0) == []


def test_a_death_at_the_start_stops_all_others() -> None:
    fleet = new()
    step(fleet, Began(), 0.0)
    step(fleet, Answered("controller", healthy=True), 0.0)
    step(fleet, Answered("router", healthy=True), 0.0)
    assert step(fleet, Exited("prefill-0", 1, "ValueError: no"), 5.0) == [Terminate("router")]
    assert fleet.reason == "prefill-0 ended with exit code 1: ValueError: no (while it was starting)"
    assert fleet.failed == "prefill-0"
    assert step(fleet, Exited("router", 0), 5.1) == [Terminate("decode-0")]
    assert step(fleet, Exited("decode-0", -15), 5.2) == [Terminate("controller")]
    assert step(fleet, Exited("controller", 0), 5.3) == [Finish(1)]
    assert (fleet.phase, states(fleet)["prefill-0"]) == ("failed", "gone")


def test_the_controllers_death_at_the_start_needs_no_stop() -> None:
    fleet = new()
    step(fleet, Began(), 0.0)
    assert step(fleet, Exited("controller", None, "no such file"), 1.0) == [Finish(1)]
    assert fleet.reason == "controller could not be started: no such file (while it was starting)"
    assert states(fleet) == {"controller": "gone", "router": "stopped", "prefill-0": "stopped", "decode-0": "stopped"}


def test_silence_at_the_start_ends_it_and_names_the_setting() -> None:
    fleet = new()
    step(fleet, Began(), 0.0)
    step(fleet, Answered("controller", healthy=True), 1.0)
    step(fleet, Answered("router", healthy=True), 1.0)
    assert step(fleet, Tick(), 101.0) == [Terminate("router")]
    assert fleet.reason == "prefill-0 did not answer GET /health with 200 within 100 s (setting: launcher.ready_s)"


def test_a_ready_instance_that_dies_while_others_load_ends_the_start() -> None:
    fleet = new()
    step(fleet, Began(), 0.0)
    for name in ("controller", "prefill-0"):
        step(fleet, Answered(name, healthy=True), 0.0)
    assert step(fleet, Exited("prefill-0", -9), 1.0) == [Terminate("router")]
    assert fleet.reason == "prefill-0 was ended by SIGKILL"


def test_a_taken_port_is_tried_again_three_times() -> None:
    fleet = new()
    step(fleet, Began(), 0.0)
    taken = Exited("controller", 1, "address already in use", port_taken=True)
    again: list[Effect] = [
        Note("config.port_retry", "controller", "the port of controller was taken; another is tried"),
        Repick("controller"),
        Start("controller"),
    ]
    assert step(fleet, taken, 1.0) == again
    assert step(fleet, taken, 2.0) == again
    assert step(fleet, taken, 3.0) == [Finish(1)]


def test_a_port_the_user_chose_is_not_replaced() -> None:
    fleet = new(fixed="controller")
    step(fleet, Began(), 0.0)
    assert step(fleet, Exited("controller", 1, port_taken=True), 1.0) == [Finish(1)]


def test_a_dead_instance_comes_back_ever_more_slowly_until_it_is_given_up() -> None:
    fleet, now = serving(), 5.0
    for wait in (0.5, 1.0, 2.0):
        assert step(fleet, Exited("decode-0", -9), now) == [
            Note("child.restart", "decode-0", f"decode-0 was ended by SIGKILL; it is started again in {wait:.2g} s")
        ]
        assert step(fleet, Tick(), now + wait - 0.01) == []
        now += wait
        assert step(fleet, Tick(), now) == [Start("decode-0")]
    note = (
        "died 4 times within 100 s (launcher.restarts_max, restart_window_s), last: decode-0 was ended by SIGKILL; "
        "start it again with: vllm-fleet restart decode-0"
    )
    assert step(fleet, Exited("decode-0", -9), now) == [Note("child.given_up", "decode-0", f"decode-0 {note}")]
    assert (fleet.phase, fleet.children["decode-0"].note) == ("serving", note)
    assert states(fleet) == {"controller": "ready", "router": "ready", "prefill-0": "ready", "decode-0": "given_up"}
    assert step(fleet, Tick(), now + 500.0) == []


def test_deaths_long_ago_do_not_count() -> None:
    fleet, now = serving(), 5.0
    for _ in range(20):
        assert step(fleet, Exited("decode-0", 1), now)[0] == Note(
            "child.restart", "decode-0", "decode-0 ended with exit code 1; it is started again in 0.5 s"
        )
        step(fleet, Tick(), now + 1.0)
        step(fleet, Answered("decode-0", healthy=True), now + 2.0)
        now += 101.0
    assert states(fleet)["decode-0"] == "ready"


def test_those_that_die_together_do_not_start_together() -> None:
    fleet = serving()
    fleet.rng = random.Random(1)
    for name in ("prefill-0", "decode-0"):
        step(fleet, Exited(name, 1), 5.0)
    first, second = (fleet.children[name].restart_at for name in ("prefill-0", "decode-0"))
    assert first != second
    assert all(5.5 <= at <= 5.75 for at in (first, second))


def test_a_restarted_instance_whose_port_is_taken_gets_another() -> None:
    fleet = serving()
    step(fleet, Exited("decode-0", 1), 5.0)
    step(fleet, Tick(), 5.5)
    assert step(fleet, Exited("decode-0", 1, "address already in use", port_taken=True), 6.0) == [
        Note("config.port_retry", "decode-0", "the port of decode-0 was taken; another is tried"),
        Repick("decode-0"),
        Start("decode-0"),
    ]


def test_a_restarted_instance_that_stays_silent_is_killed_and_tried_again() -> None:
    fleet = serving()
    step(fleet, Exited("decode-0", 1), 5.0)
    step(fleet, Tick(), 5.5)
    assert Kill("decode-0") in step(fleet, Tick(), 106.0)
    step(fleet, Exited("decode-0", -9), 106.1)
    assert states(fleet)["decode-0"] == "restarting"


def test_router_and_controller_come_back_ever_more_slowly() -> None:
    for name in ("router", "controller"):
        fleet, now = serving(), 10.0
        for wait in (0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0):
            assert step(fleet, Exited(name, 3, "x"), now) == [
                Note("child.restart", name, f"{name} ended with exit code 3: x; it is started again in {wait:g} s")
            ]
            assert step(fleet, Tick(), now + wait - 0.01) == []
            now += wait
            assert step(fleet, Tick(), now) == [Start(name)]
        step(fleet, Answered(name, healthy=True), now)
        assert fleet.phase == "serving"
        assert step(fleet, Exited(name, 0), now + 61.0) == [
            Note("child.restart", name, f"{name} ended with exit code 0; it is started again in 0.5 s")
        ]


def test_a_restarted_router_that_stays_silent_is_killed() -> None:
    fleet = serving()
    step(fleet, Exited("router", 1), 10.0)
    step(fleet, Tick(), 11.0)
    step(fleet, Tick(), 11.3)
    assert step(fleet, Tick(), 111.0) == [Kill("router")]
    assert step(fleet, Tick(), 111.1) == []
    assert step(fleet, Exited("router", -9), 111.2)[0] == Note(
        "child.restart", "router", "router was ended by SIGKILL; it is started again in 1 s"
    )


def test_stop_goes_router_instances_controller() -> None:
    fleet = serving()
    assert step(fleet, StopAsked(), 10.0) == [Terminate("router")]
    assert step(fleet, Tick(), 10.1) == []
    assert step(fleet, Exited("router", 0), 10.2) == [Terminate("prefill-0"), Terminate("decode-0")]
    assert step(fleet, Exited("prefill-0", -15), 10.3) == []
    assert step(fleet, Exited("decode-0", -15), 10.3) == [Terminate("controller")]
    assert step(fleet, Exited("controller", 0), 10.4) == [Finish(0)]
    assert (fleet.phase, fleet.reason) == ("stopped", "")
    assert step(fleet, Tick(), 30.0) == []
    assert step(fleet, StopAsked(), 30.0) == []


def test_stop_does_not_wait_for_those_that_hang() -> None:
    fleet = serving()
    step(fleet, StopAsked(), 10.0)
    assert step(fleet, Tick(), 11.9) == []
    assert step(fleet, Tick(), 12.0) == [Terminate("prefill-0"), Terminate("decode-0")]
    assert step(fleet, Tick(), 16.7) == []
    assert step(fleet, Tick(), 16.8) == [Terminate("controller")]
    assert step(fleet, Exited("controller", 0), 16.9) == []
    assert step(fleet, Tick(), 18.0) == [Kill("router"), Kill("prefill-0"), Kill("decode-0")]
    assert step(fleet, Tick(), 18.1) == []
    for name in ("router", "prefill-0"):
        assert step(fleet, Exited(name, -9), 18.2) == []
    assert step(fleet, Exited("decode-0", -9), 18.3) == [Finish(0)]


def test_running_requests_get_their_time_before_instances_are_stopped() -> None:
    fleet = serving(drain_s=60.0)
    assert step(fleet, StopAsked(), 10.0) == [Terminate("router")]
    text = "running requests get 60 s (launcher.drain_s) to end; a second signal ends them at once"
    assert step(fleet, Tick(), 11.0) == [Note("fleet.draining", "router", text)]
    assert step(fleet, Tick(), 69.9) == []
    assert step(fleet, Tick(), 70.0) == [], "the router says so to those whose time is over"
    assert step(fleet, Exited("router", 0), 70.5) == [Terminate("prefill-0"), Terminate("decode-0")]


def test_a_router_without_requests_is_not_waited_for() -> None:
    fleet = serving(drain_s=60.0)
    step(fleet, StopAsked(), 10.0)
    assert step(fleet, Exited("router", 0), 10.1) == [Terminate("prefill-0"), Terminate("decode-0")]
    assert step(fleet, Tick(), 18.0) == [Terminate("controller")], "stop_s counts from the router's end"
    assert step(fleet, Tick(), 18.2) == [Kill("controller"), Kill("prefill-0"), Kill("decode-0")]


def test_what_cannot_be_killed_is_named() -> None:
    fleet = serving()
    step(fleet, StopAsked(), 10.0)
    for name in ("router", "prefill-0", "controller"):
        step(fleet, Exited(name, 0), 10.1)
    assert step(fleet, Tick(), 18.0) == [Kill("decode-0")]
    assert step(fleet, Tick(), 19.5) == [Finish(1)]
    assert fleet.reason == "decode-0 could not be killed"


def test_a_second_request_kills_at_once() -> None:
    fleet = serving()
    step(fleet, StopAsked(), 10.0)
    assert step(fleet, StopAsked(), 10.1) == [Kill("controller"), Kill("router"), Kill("prefill-0"), Kill("decode-0")]


def test_a_stop_during_the_start_is_no_success() -> None:
    fleet = new()
    step(fleet, Began(), 0.0)
    assert step(fleet, StopAsked(), 1.0) == [Terminate("controller")]
    assert step(fleet, Exited("controller", -15), 1.1) == [Finish(1)]
    assert (fleet.reason, fleet.failed) == ("stopped before it was ready", None)


def test_a_router_that_waits_for_its_restart_is_not_started_by_the_stop() -> None:
    fleet = serving()
    step(fleet, Exited("router", 1), 10.0)
    assert step(fleet, StopAsked(), 10.1) == [Terminate("prefill-0"), Terminate("decode-0")]
    assert step(fleet, Tick(), 11.0) == []
    assert states(fleet)["router"] == "stopped"


def test_endings_in_words() -> None:
    assert ending(None, "why") == "could not be started: why"
    assert ending(-11) == "was ended by SIGSEGV"
    assert ending(2) == "ended with exit code 2"
