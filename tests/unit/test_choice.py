"""Load or compute: the quicker one by what was seen, and loading where nothing was."""

from __future__ import annotations

import pytest

from vllm_fleet.connector.choice import AGAIN_EVERY, LOADS_MIN, STEPS_KEPT, Choice
from vllm_fleet.core import limits


def learnt(fixed_s: float, per_token_s: float, compute_s: float) -> Choice:
    """After loads of a peer with a fixed cost and a speed, and steps that computed at another."""
    choice = Choice()
    for index in range(40):
        tokens = 100 + 50 * (index % 9)
        choice.loaded("p", tokens, fixed_s + per_token_s * tokens)
        choice.computed(tokens, compute_s * tokens)
    return choice


def test_what_is_not_known_is_loaded() -> None:
    choice = Choice()
    assert choice.loads("p", 1)
    assert choice.below("p") is None
    for _ in range(LOADS_MIN):
        choice.loaded("p", 100, 1.0)
    assert choice.loads("p", 1)  # how quick this engine computes is not known


@pytest.mark.parametrize(("fixed", "per_token", "compute"), [(0.01, 1e-6, 1e-4), (0.1, 5e-5, 2e-4), (0.001, 0.0, 1e-5)])
def test_the_threshold_is_where_both_take_as_long(fixed: float, per_token: float, compute: float) -> None:
    below = learnt(fixed, per_token, compute).below("p")
    assert below == pytest.approx(fixed / (compute - per_token), rel=0.02, abs=1)


def test_short_prompts_are_computed_and_long_ones_loaded() -> None:
    choice = learnt(0.01, 1e-6, 1e-4)
    assert not choice.loads("p", 50)
    assert choice.loads("p", 500)
    assert choice.loads("q", 50)  # another peer is not judged by this one


def test_a_link_slower_than_computing_is_never_worth_it() -> None:
    choice = learnt(0.0, 1e-3, 1e-4)
    assert choice.below("p") == limits.TOKENS_MAX
    assert not choice.loads("p", 100_000)


def test_now_and_then_a_load_goes_ahead_to_learn() -> None:
    choice = learnt(0.01, 1e-6, 1e-4)
    assert sum(choice.loads("p", 10) for _ in range(5 * AGAIN_EVERY)) == 5


def test_a_link_that_has_become_slow_is_noticed_and_so_is_its_recovery() -> None:
    choice = learnt(0.001, 1e-6, 1e-4)
    assert choice.loads("p", 100)
    for _ in range(60):
        choice.loaded("p", 200, 1.0)
    assert not choice.loads("p", 100)
    for _ in range(200):
        choice.loaded("p", 200, 0.001)
    assert choice.loads("p", 100)


def test_one_slow_step_changes_nothing() -> None:
    choice = learnt(0.01, 1e-6, 1e-4)
    before = choice.below("p")
    choice.computed(100, 30.0)  # the engine was idle in between
    assert choice.below("p") == before
    assert len(choice.steps) == STEPS_KEPT


def test_steps_that_compute_little_teach_nothing() -> None:
    choice = Choice()
    choice.computed(3, 1.0)
    assert not choice.steps


def test_peers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PEERS_MAX", 3)
    choice = Choice()
    for index in range(9):
        choice.loaded(str(index), 10, 0.1)
    assert sorted(choice.peers) == ["6", "7", "8"]
