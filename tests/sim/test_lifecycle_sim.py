"""Simulated fleets become what they are to be, and nobody is stopped in the middle of a request."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.sim.lifecycle import run_seed
from tests.sim.seeds import kept
from vllm_fleet.controller import wishes
from vllm_fleet.controller.state import FleetState
from vllm_fleet.launcher import reconcile
from vllm_fleet.launcher.events import DrainAnswer
from vllm_fleet.launcher.fleet import Child, Turn
from vllm_fleet.wire.control import Slot

CHUNK = 25
KEPT = (1045, 1096, 1155)
"""Seeds that once failed: a rolling restart whose stand-in was taken away while it waited."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Torn journals are expected here and not worth a line each."""
    logger = logging.getLogger("vllm_fleet")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)


@pytest.mark.parametrize("first", range(0, 100, CHUNK))
def test_the_fleet_becomes_what_it_is_to_be(first: int) -> None:
    outcomes = [run_seed(seed) for seed in range(first, first + CHUNK)]
    broken = [f"seed {outcome.seed}: {outcome.broken}" for outcome in outcomes if outcome.broken]
    assert not broken, "\n".join(broken)
    counts = sum((outcome.counts for outcome in outcomes), Counter[str]())
    for count in ("scale", "role", "drain", "restart", "rolling", "kill", "crash", "left in order", "child.restart"):
        assert counts[count] > 0, f"{count}: never"


@pytest.mark.parametrize("seed", KEPT)
def test_seeds_that_once_failed(seed: int) -> None:
    assert run_seed(seed).broken == ""


@pytest.mark.parametrize("seed", kept("lifecycle"))
def test_seeds_that_failed_once_hold(seed: int) -> None:
    outcome = run_seed(seed)
    assert not outcome.broken, outcome


def test_a_seed_decides_everything() -> None:
    assert run_seed(3) == run_seed(3)


def stop_at_once(turn: Turn, child: Child, answer: DrainAnswer) -> None:
    if child.state == "draining":
        reconcile.stop(turn, child)


def no_role(state: FleetState, name: str) -> Slot | None:
    return None


@pytest.mark.parametrize(
    ("where", "what", "planted", "found"),
    [
        (reconcile, "on_drain_answer", stop_at_once, "is stopped with"),
        (FleetState, "slot", no_role, "members: "),
        (wishes, "is_old", lambda held, generation: False, "had effects|changed the state|was answered"),
    ],
)
def test_planted_bugs_are_found(
    monkeypatch: pytest.MonkeyPatch, where: object, what: str, planted: object, found: str
) -> None:
    """Known-bad variants: if one stops being found, the simulation has gone blind."""
    monkeypatch.setattr(where, what, planted)
    outcome = next((o for o in map(run_seed, range(100)) if o.broken), None)
    assert outcome is not None, f"100 seeds did not find the planted bug in {what}"
    assert re.search(found, outcome.broken), outcome
