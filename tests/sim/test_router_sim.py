"""Simulated fleets behind a real router: every request ends once, with the right tokens."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.sim.router import run_seed
from tests.sim.seeds import kept
from vllm_fleet.router import resume
from vllm_fleet.router.breaker import Breaker
from vllm_fleet.router.handoff import Handoff
from vllm_fleet.router.relay import Relay
from vllm_fleet.router.resume_join import Join
from vllm_fleet.router.resume_track import Tracker
from vllm_fleet.router.turns import Turns

CHUNK = 5
KEPT = (0, 1, 4, 6, 10, 13, 15, 25)
"""Seeds that once failed: a death behind [DONE], a second try that began with what the first had used up, an error that
took the events before it along."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Failing instances are expected here and not worth a line each."""
    logger = logging.getLogger("vllm_fleet")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)


@pytest.mark.parametrize("first", range(100, 120, CHUNK))
def test_no_request_is_lost(first: int) -> None:
    outcomes = [run_seed(seed) for seed in range(first, first + CHUNK)]
    broken = [f"seed {outcome.seed}: {outcome.broken}" for outcome in outcomes if outcome.broken]
    assert not broken, "\n".join(broken)
    counts = sum((outcome.counts for outcome in outcomes), Counter[str]())
    wanted = ("kill", "stop", "sicken", "occupy", "5xx", "engine died", "busy", "resumed", "retried", "client left")
    for count in (*wanted, "streamed", "answered", "status 429"):
        assert counts[count] > 0, f"{count}: never"


@pytest.mark.parametrize("seed", [*KEPT, *kept("router")])
def test_seeds_that_failed_once_hold(seed: int) -> None:
    outcome = run_seed(seed)
    assert not outcome.broken, outcome


def test_a_seed_decides_everything() -> None:
    assert run_seed(3) == run_seed(3)


# Known-bad variants: if one stops being found, the simulation has gone blind ---------------------------------------


def last_mark(sent: Tracker, held: int, back: int) -> int:
    return len(sent.mark_tokens) - 1


def nothing_expected(request: Any, sent: Tracker, mode: Any) -> Any:
    found = plan(request, sent, mode)
    return found if isinstance(found, str) else type(found)(found.way, found.request, 0, (), 0, 0, clean=True)


def no_second_join(relay: Relay) -> None:
    if relay._resumption is not None:
        assert relay._tracker is not None
        relay._join = relay._join or Join(relay._resumption, relay._tracker)
    else:
        begin(relay)


plan, begin = resume.plan, Relay.begin


@pytest.mark.parametrize(
    ("where", "what", "planted", "found"),
    [
        (resume, "_clean_mark", last_mark, "text is|tokens is|counted|stream ended"),
        (resume, "_loose", lambda values, *, greedy: None, "text is|finish is|counted|stream ended"),
        (resume, "plan", nothing_expected, "text is|tokens is|usage is|counted"),
        (Relay, "begin", no_second_join, "text is|tokens is|counted|stream ended"),
        (Breaker, "allows", lambda breaker, now: breaker.closed, "left out|after"),
        (Turns, "call", lambda turns: None, "429"),
        (Handoff, "elsewhere", lambda handoff, now: False, "deadline_exceeded|after"),
    ],
)
def test_planted_bugs_are_found(
    monkeypatch: pytest.MonkeyPatch, where: object, what: str, planted: object, found: str
) -> None:
    monkeypatch.setattr(where, what, planted)
    outcome = next((o for o in map(run_seed, range(30)) if o.broken), None)
    assert outcome is not None, f"30 seeds did not find the planted bug in {what}"
    assert re.search(found, outcome.broken), outcome
