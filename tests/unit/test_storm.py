"""The storm's judgement: which errors a fault excuses, which gauges count as a leak."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from vllm_fleet.bench.gauges import Gauges, growth, leaks
from vllm_fleet.bench.own_fleet import process_state
from vllm_fleet.bench.storm import Away, excuse
from vllm_fleet.bench.storm_client import Ended, Outcome, draw

BOTH = ("decode-0", "decode-1")
KILLED = Away("decode-0", "kill", 10.0, 20.0)
STOPPED = Away("decode-1", "stop", 15.0, 18.0)
IDLE = Gauges(0.25, 0, 0, 0, 0, 0, 100, 50)


def ended(outcome: Outcome, began_s: float = 12.0, ended_s: float = 16.0, decode: str | None = "decode-0") -> Ended:
    return Ended("r", outcome, began_s, ended_s, decode)


@pytest.mark.parametrize(
    ("found", "away", "excused"),
    [
        (ended("cut"), [KILLED], True),
        (ended("cut", decode="decode-1"), [KILLED], False),
        (ended("cut", decode="decode-1"), [STOPPED], False),
        (ended("cut", 1.0, 9.0), [KILLED], False),
        (ended("cut", 21.0, 22.0), [KILLED], False),
        (ended("no_answer"), [KILLED], False),
        (ended("no_answer"), [KILLED, STOPPED], True),
        (ended("no_answer", 16.0, 16.1), [KILLED, STOPPED], True),
        (ended("no_answer", 18.5, 19.0), [KILLED, STOPPED], False),
        (ended("no_answer"), [KILLED, replace(STOPPED, from_s=20.5, until_s=22.0)], False),
        (ended("wrong"), [KILLED, STOPPED], False),
        (ended("hung"), [KILLED, STOPPED], False),
        (ended("broken"), [KILLED, STOPPED], False),
    ],
)
def test_only_what_a_fault_explains_is_excused(found: Ended, away: list[Away], excused: bool) -> None:
    assert bool(excuse(found, away, BOTH)) is excused


@pytest.mark.parametrize("what", ["usage", "pins", "reserved", "running", "waiting", "in_flight"])
def test_whatever_is_still_held_is_a_leak(what: str) -> None:
    assert leaks({"a": IDLE}, {"a": IDLE}) == []
    more: dict[str, Any] = {what: 1.0}
    [found] = leaks({"a": IDLE}, {"a": replace(IDLE, **more)})
    assert what in found


def test_files_and_threads_may_differ_by_a_few() -> None:
    assert growth({"a": IDLE}, {"a": replace(IDLE, fds=108, threads=42)}, 8) == []
    assert len(growth({"a": IDLE}, {"a": replace(IDLE, fds=109, threads=59)}, 8)) == 2


def test_the_requests_are_those_of_the_seed() -> None:
    drawn = [[draw(random.Random(seed), 0.5) for _ in range(3)] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_process_that_is_gone_has_no_state() -> None:
    assert process_state(os.getpid()) in ("R", "S")
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert process_state(child.pid) == ""
