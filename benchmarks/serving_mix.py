"""Phase d of benchmarks/gpu_serving.py: a load that arrives at a rate, on our pair and on two plain instances."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks.serving_load import Bench, RequestFailed, Stream, grown, no_pauses, percentile, spread

WINDOW_S = 12.0
DRAIN_S = 25.0
REQUESTS_MIN = 20
GOALS_MS = ((200, 10), (200, 20), (500, 10), (500, 20), (1000, 20), (1000, 50), (2000, 100))
"""TTFT and time per token that a request must both keep, to count as good."""
KINDS: Mapping[str, tuple[Mapping[int, float], tuple[int, ...]]] = {
    "mixed": ({512: 0.3, 1024: 0.3, 2048: 0.2, 4096: 0.1, 8192: 0.1}, (64, 128, 256, 512)),
    "long": ({1024: 0.5, 2048: 0.5}, (256, 512, 768, 1024)),
}
"""Tokens of the prompt with their share, and tokens of the answer, all equally often."""


@dataclass(frozen=True)
class Arrival:
    """One request to be."""

    at_s: float
    prompt_tokens: int
    answer_tokens: int


@dataclass
class Asked:
    """One request that was sent, and its answer as far as it came."""

    arrival: Arrival
    stream: Stream
    failed: str | None = None


def arrivals(load: str, shrink: int) -> list[Arrival]:
    """Poisson arrivals of a load ``KIND@RATE`` (requests/s), the same ones each time."""
    kind, _, rate = load.partition("@")
    rng, per_s = random.Random(load), float(rate)
    prompts, answer_tokens = KINDS[kind]
    window_s, at_s = max(WINDOW_S, REQUESTS_MIN / per_s), rng.expovariate(per_s)
    made: list[Arrival] = []
    while at_s < window_s or len(made) < REQUESTS_MIN:
        prompt = rng.choices(list(prompts), list(prompts.values()))[0]
        made.append(Arrival(at_s, prompt // shrink, rng.choice(answer_tokens) // shrink))
        at_s += rng.expovariate(per_s)
    return made


async def run(bench: Bench, names: Sequence[str], load: Sequence[Arrival]) -> list[Asked]:
    """Ask ``names`` in turn, each request at its time; what has not ended DRAIN_S after the last arrival is cut off."""
    bodies = [json.dumps(bench.body(each.prompt_tokens, each.answer_tokens)).encode() for each in load]
    asked = [Asked(each, Stream()) for each in load]
    began = time.perf_counter()

    async def one(number: int, each: Asked) -> None:
        await asyncio.sleep(began + each.arrival.at_s - time.perf_counter())
        try:
            await bench.stream(names[number % len(names)], bodies[number], each.stream, load[-1].at_s + DRAIN_S)
        except RequestFailed as error:
            each.failed = str(error)

    tasks = [asyncio.create_task(one(number, each)) for number, each in enumerate(asked)]
    _, late = await asyncio.wait(tasks, timeout=load[-1].at_s + DRAIN_S)
    for task in late:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for each in asked:
        if each.failed is None and not each.stream.tokens:
            each.failed = f"not ended {DRAIN_S:.0f} s after the last arrival"
    return asked


def summary(asked: Sequence[Asked]) -> dict[str, Any]:
    """Latencies of what was answered, in ms; good requests per second, counting what was not answered as not good."""
    done = [each for each in asked if each.failed is None]
    span_s = asked[-1].arrival.at_s
    good = {
        f"ttft<={ttft},tpot<={tpot}": round(
            sum(1e3 * each.stream.ttft_s <= ttft and 1e3 * each.stream.tpot_s <= tpot for each in done) / span_s, 3
        )
        for ttft, tpot in GOALS_MS
    }
    return {
        "asked": len(asked),
        "answered": len(done),
        "offered_per_s": round(len(asked) / span_s, 3),
        "ttft_ms": spread([each.stream.ttft_s for each in done]),
        "tpot_ms": spread([each.stream.tpot_s for each in done]),
        "between_tokens_ms": spread([b - a for each in done for a, b in pairwise(each.stream.at)]),
        "good_per_s": good,
        "handoffs": dict(Counter(each.stream.mode for each in done)),
        "failed": [each.failed for each in asked if each.failed][:10],
        "raw": [_raw(each) for each in done],
        "raw_columns": ["arrived_s", "prompt_tokens", "answer_tokens", "ttft_ms", "tpot_ms", "p99_between_ms"],
    }


def _raw(asked: Asked) -> list[float]:
    stream, arrival = asked.stream, asked.arrival
    between = percentile([b - a for a, b in pairwise(stream.at)] or [0.0], 0.99)
    figures = [arrival.at_s, 1e3 * stream.ttft_s, 1e3 * stream.tpot_s, 1e3 * between]
    at_s, ttft, tpot, worst = (round(figure, 3) for figure in figures)
    return [at_s, arrival.prompt_tokens, stream.tokens, ttft, tpot, worst]


async def loads(bench: Bench, wanted: Sequence[str], until: float, into: dict[str, Any]) -> None:
    """Phase d: each load on our pair and on the plain instances behind round robin, the first of them in turn.

    What could be measured stands in ``into`` as soon as it is known.
    """
    arms = {"1P1D": ["router"], "plain": [name for name in ("plain-0", "plain-1") if bench.started.has(name)]}
    rows: list[dict[str, Any]] = into.setdefault("rows", [])
    skipped: list[str] = into.setdefault("skipped", [])
    for number, load in enumerate(wanted):
        coming = arrivals(load, bench.device.shrink)
        if time.monotonic() + 2 * (coming[-1].at_s + DRAIN_S / 2) > until:
            skipped.append(f"{load}: no time left")
            continue
        for arm in list(arms)[:: 1 if number % 2 == 0 else -1]:
            before = await bench.counters()
            with no_pauses():
                asked = await run(bench, arms[arm], coming)
            row = {"load": load, "arm": arm, "instances": len(arms["plain"]) if arm == "plain" else 2}
            rows.append(row | summary(asked) | {"counters": grown(before, await bench.counters())})
