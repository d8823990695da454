"""launcher.membership: what the supervisor tells the controller about instances that cannot do it themselves."""

from __future__ import annotations

from vllm_fleet.launcher.membership import ASK_EVERY_S, ASK_SERVING_S, RETRY_S, SILENCE_S, Ask, Beat, Join, Leave, Life
from vllm_fleet.wire.control import Heartbeat, Register, Registered, ReportedState

BEAT_S = 0.5
ANSWER = Registered(generation=7, revision=9, heartbeat_s=BEAT_S, lease_s=10.0)
FINGERPRINT = {"connector": "nixl", "model": "m"}


def new() -> Life:
    return Life("prefill-0", "prefill", "http://127.0.0.1:1", 42, "life", FINGERPRINT)


def join(state: ReportedState) -> Join:
    return Join(Register("prefill-0", "prefill", "http://127.0.0.1:1", 42, "life", state, FINGERPRINT))


def beat(state: ReportedState) -> Beat:
    return Beat("prefill-0", Heartbeat(7, state))


def serving() -> Life:
    """Registered and healthy at 0.0, nothing in flight."""
    life = new()
    life.due(0.0)
    life.on_health(True, 0.0)
    life.on_joined(ANSWER, 0.0)
    return life


def test_it_registers_at_once_and_says_when_it_serves() -> None:
    life = new()
    assert life.due(0.0) == [Ask(), join("starting")]
    assert life.due(5.0) == [], "one question and one call at a time"
    life.on_joined(ANSWER, 5.0)
    life.on_health(False, 5.0)
    assert life.due(5.0) == []
    assert life.due(5.0 + ASK_EVERY_S) == [Ask()]
    assert life.due(5.0 + BEAT_S) == [beat("starting")]
    life.on_beat(None, 5.6)
    life.on_health(True, 5.6)
    assert life.due(5.6) == [beat("ready")], "without waiting for the next heartbeat"
    life.on_beat(None, 5.6)
    assert life.due(5.7) == []
    assert life.due(5.6 + BEAT_S) == [beat("ready")]
    life.on_beat(None, 7.5)
    assert life.due(5.6 + ASK_SERVING_S) == [Ask()]


def test_a_slow_answer_of_the_instance_does_not_hold_heartbeats_up() -> None:
    life = serving()
    assert life.due(ASK_SERVING_S) == [Ask(), beat("ready")]
    life.on_beat(None, ASK_SERVING_S)
    assert life.due(ASK_SERVING_S + BEAT_S) == [beat("ready")]


def test_it_speaks_as_often_as_it_is_told_last() -> None:
    life = serving()
    assert life.due(BEAT_S) == [beat("ready")]
    life.on_beat(1.0, BEAT_S)
    assert life.due(BEAT_S + 0.9) == []
    assert life.due(BEAT_S + 1.0) == [beat("ready")]
    life.on_beat(None, 1.5)
    assert beat("ready") in life.due(1.5 + BEAT_S)


def test_an_instance_that_stays_silent_gets_no_heartbeats_until_it_answers() -> None:
    life = serving()
    assert life.due(SILENCE_S) == [Ask(), beat("ready")]
    life.on_beat(None, SILENCE_S)
    life.on_health(False, SILENCE_S + 0.1)
    assert life.due(SILENCE_S + BEAT_S + 0.1) == [Ask()]
    life.on_health(True, 30.0)
    assert life.due(30.0) == [beat("ready")]


def test_whoever_is_not_known_registers_again_as_the_same_life() -> None:
    life = serving()
    life.due(0.5)
    life.on_failed(0.5, unknown=False)
    assert life.due(0.5 + RETRY_S - 0.01) == []
    assert life.due(0.5 + RETRY_S) == [beat("ready")]
    life.on_failed(1.0, unknown=True)
    assert life.due(1.0 + RETRY_S) == [join("ready")]


def test_it_leaves_once() -> None:
    life = serving()
    life.end()
    life.end()
    assert life.due(0.1) == [Leave("prefill-0", 7)]
    assert life.due(9.0) == []
    assert not life.over
    life.on_left()
    assert life.over
    assert life.due(9.0) == []


def test_a_call_under_way_ends_before_it_leaves() -> None:
    life = new()
    life.due(0.0)
    life.end()
    assert life.due(0.1) == []
    life.on_joined(ANSWER, 0.2)
    assert life.due(0.2) == [Leave("prefill-0", 7)]


def test_who_never_joined_need_not_leave() -> None:
    life = new()
    life.due(0.0)
    life.on_failed(0.1, unknown=False)
    life.end()
    assert life.due(0.1) == []
    assert life.over
