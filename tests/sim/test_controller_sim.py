"""Simulated fleets keep every promise under faults, and the simulation notices when the controller is broken."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from itertools import chain

import pytest

from tests.sim.world import Outcome, run_seed
from vllm_fleet.controller import reactor
from vllm_fleet.controller.state import Entry, FleetState
from vllm_fleet.controller.stores.memory import MemoryStore
from vllm_fleet.wire.control import Member

CHUNK = 50
KNOWN_BAD_SEEDS = 200


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Torn journals are expected here and not worth a line each."""
    logger = logging.getLogger("vllm_fleet")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)


@pytest.mark.parametrize("first", range(0, 400, CHUNK))
def test_promises_hold_under_faults(first: int) -> None:
    outcomes = [run_seed(seed) for seed in range(first, first + CHUNK)]
    broken = [outcome.summary() for outcome in outcomes if outcome.broken]
    assert not broken, "\n".join([*broken, "again with: python -m tests.sim --seed SEED"])
    assert_faults_happened(outcomes)


def assert_faults_happened(outcomes: Sequence[Outcome]) -> None:
    """A run in which nothing went wrong proves nothing."""
    for count in ("lost", "doubled", "generations", "changes seen", "snapshots seen"):
        assert sum(outcome.counts[count] for outcome in outcomes) > 0, f"{count}: never"
    assert any(outcome.counts["controller starts"] > 1 for outcome in outcomes)
    kinds = set(chain.from_iterable(outcome.faults for outcome in outcomes))
    assert {"zombie", "torn_crash", "fill_disk", "pause_controller", "step_clock", "partition"} <= kinds


def test_a_seed_decides_everything() -> None:
    assert run_seed(7) == run_seed(7)


def never_old(held: Member, generation: int) -> bool:
    return False


def forget(state: FleetState, name: str, incarnation: str, left: bool) -> None:
    pass


def same_history(state: FleetState, controller: str) -> None:
    pass


def save_nothing(store: MemoryStore, entries: Sequence[Entry]) -> None:
    pass


@pytest.mark.parametrize(
    ("where", "what", "planted", "found"),
    [
        (reactor, "is_old", never_old, "was answered 200|had effects"),
        (FleetState, "remember", forget, "does not come to rest|had effects|is dead but"),
        (FleetState, "restart_history", same_history, "came after|another fleet|is at"),
        (MemoryStore, "append", save_nothing, "forgot generation"),
    ],
)
def test_planted_bugs_are_found(
    monkeypatch: pytest.MonkeyPatch, where: object, what: str, planted: object, found: str
) -> None:
    """Known-bad variants: if one stops being found, the simulation has gone blind."""
    monkeypatch.setattr(where, what, planted)
    outcome = next((o for o in map(run_seed, range(KNOWN_BAD_SEEDS)) if o.broken), None)
    assert outcome is not None, f"{KNOWN_BAD_SEEDS} seeds did not find the planted bug in {what}"
    assert re.search(found, outcome.broken), outcome.summary()
