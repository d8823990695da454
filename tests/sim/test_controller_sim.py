"""Simulated fleets keep every promise under faults, and the simulation notices when the controller is broken."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from itertools import chain

import pytest

from tests.sim.controller_sim import RULES
from tests.sim.seeds import kept
from tests.sim.world import NAMES, Outcome, World, run_seed
from vllm_fleet.controller import reactor
from vllm_fleet.controller.journal import Loaded, Mark
from vllm_fleet.controller.state import Entry, FleetState
from vllm_fleet.controller.stores.memory import MemoryStore
from vllm_fleet.wire.control import Member

CHUNK = 50
KINDS = {
    "kill", "pause", "zombie", "leave", "rename", "crash", "torn_crash", "pause_controller", "pause_all", "fill_disk",
    "old_journal", "no_journal", "step_clock", "step_members_clock", "drift", "partition", "one_way", "mute", "deaf",
    "double_all",
}  # fmt: skip
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
    assert kinds == KINDS


@pytest.mark.parametrize("seed", kept("controller"))
def test_seeds_that_failed_once_hold(seed: int) -> None:
    outcome = run_seed(seed)
    assert not outcome.broken, outcome.summary()


@pytest.mark.parametrize("kind", ["one_way", "mute", "deaf", "partition"])
def test_both_sides_agree_within_a_lease_of_healing(kind: str) -> None:
    """With nothing else going wrong: who was not heard, or did not hear, knows how it ended."""
    for seed in range(20):
        world = World(seed, [kind])
        outcome = world.run_and_heal(RULES.lease_s)
        assert not outcome.broken, outcome.summary()
        assert outcome.faults[kind] > 5


@pytest.mark.parametrize("kind", ["partition", "one_way", "pause_all", "pause_controller", "step_clock", "drift"])
def test_nobody_is_lost_to_what_befalls_the_controller(kind: str) -> None:
    """Cut off, paused, or its clock set: all its members live, and stay who they are."""
    for seed in range(20):
        outcome = run_seed(seed, [kind])
        assert not outcome.broken, outcome.summary()
        assert outcome.counts["generations"] == len(NAMES), outcome.summary()


def test_without_holding_leases_a_cut_off_controller_loses_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FleetState, "hold_leases", lambda state, now: None)
    lost = [run_seed(seed, ["partition"]).counts["generations"] > len(NAMES) for seed in range(20)]
    assert any(lost), "the simulation has gone blind"


def test_a_seed_decides_everything() -> None:
    assert run_seed(7) == run_seed(7)


def never_old(held: Member, generation: int) -> bool:
    return False


def forget(state: FleetState, name: str, incarnation: str, left: bool) -> None:
    pass


def same_history(state: FleetState, controller: str) -> None:
    pass


def judge_at_once(state: FleetState, now: float) -> None:
    pass


def no_shift(state: FleetState, seconds: float, now: float) -> None:
    pass


def not_compared(loaded: Loaded, mark: Mark) -> Loaded:
    return loaded


def save_nothing(store: MemoryStore, entries: Sequence[Entry]) -> None:
    pass


@pytest.mark.parametrize(
    ("where", "what", "planted", "found"),
    [
        (reactor, "is_old", never_old, "was answered 200|had effects"),
        (FleetState, "remember", forget, "does not come to rest|had effects|is dead but"),
        (FleetState, "restart_history", same_history, "came after|another fleet|is at|does not end at"),
        (MemoryStore, "append", save_nothing, "forgot generation"),
        (FleetState, "grant_fresh_silence", judge_at_once, "s of silence"),
        (FleetState, "shift_silence", no_shift, "s of silence"),
        (Loaded, "compared", not_compared, "forgot generation|came after|is not new"),
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
