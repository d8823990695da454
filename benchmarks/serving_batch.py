"""Phase c of benchmarks/gpu_serving.py: what handoffs do to the tokens of requests that run on decode already."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from benchmarks.serving_load import Bench, RequestFailed, Stream, grown, no_pauses, percentile, spread

SEGMENT_S = 1.5
SETTLE_S = 0.3
PAIRS_OF_A_BATCH = 5
"""Then the batch is started anew: with its age grows the KV that every step reads."""
BATCH_TOKENS_MAX = 6000
WARM_TOKENS = 20
PAIR_S = 2 * (SEGMENT_S + SETTLE_S) + 0.5
Kind = Literal["quiet", "handoffs"]


@dataclass(frozen=True)
class Segment:
    """A stretch of time in which the batch was left alone, or handoffs arrived; time.perf_counter()."""

    pair: int
    kind: Kind
    began: float
    ended: float


def gaps(at: Sequence[float], segment: Segment) -> list[float]:
    """Times between two tokens that both came within the segment."""
    inside = [each for each in at if segment.began <= each <= segment.ended]
    return [after - before for before, after in pairwise(inside)]


class Batch:
    """A decode batch, asked for half directly and half through the router, and what was seen of it."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.gaps: dict[tuple[str, Kind], list[float]] = {}
        self.p99s: dict[tuple[int, Kind], float] = {}
        self.handoff_ttft_s: list[float] = []
        self.failed: list[str] = []

    async def run(self, first: int, pairs: int) -> None:
        """Measure these pairs of segments on one batch. Raises RequestFailed when it does not come up or ends."""
        device = self._bench.device
        each = math.ceil(SEGMENT_S / device.batch_every_s)
        bodies = [json.dumps(self._bench.body(device.batch_handoff_tokens, 1)).encode() for _ in range(pairs * each)]
        segments = []
        async with self._streams() as streams:
            for pair in range(first, first + pairs):
                kinds: tuple[Kind, Kind] = ("quiet", "handoffs") if pair % 2 else ("handoffs", "quiet")
                for kind in kinds:
                    began = time.perf_counter()
                    if kind == "quiet":
                        await asyncio.sleep(SEGMENT_S)
                    else:
                        await self._disturb([bodies.pop() for _ in range(each)])
                    segments.append(Segment(pair, kind, began, time.perf_counter()))
                    await asyncio.sleep(SETTLE_S)
            ended = sum(bool(stream.tokens) for _, stream in streams)
        if ended:
            raise RequestFailed(f"{ended} of the batch's answers ended before the measurement did")
        for segment in segments:
            self._take(segment, streams)

    @contextlib.asynccontextmanager
    async def _streams(self) -> AsyncIterator[list[tuple[str, Stream]]]:
        """Running answers, all past their first tokens; cut off at the end."""
        device = self._bench.device
        streams = [("decode" if number % 2 else "router", Stream()) for number in range(device.batch)]
        tasks = []
        try:
            for name, stream in streams:
                body = self._bench.body(device.batch_tokens, BATCH_TOKENS_MAX)
                tasks.append(asyncio.create_task(self._bench.stream(name, body, stream)))
            until = time.monotonic() + 30
            while any(len(stream.at) < WARM_TOKENS for _, stream in streams):
                if time.monotonic() > until or any(task.done() for task in tasks):
                    raise RequestFailed("the batch did not start")
                await asyncio.sleep(0.05)
            yield streams
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _disturb(self, bodies: Sequence[bytes]) -> None:
        """Handoffs, one every ``batch_every_s``, until the last is over."""
        tasks = []
        for body in bodies:
            tasks.append(asyncio.create_task(self._bench.stream("router", body)))
            await asyncio.sleep(self._bench.device.batch_every_s)
        for answer in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(answer, Stream) and answer.mode == "streamed":
                self.handoff_ttft_s.append(answer.ttft_s)
            else:
                self.failed.append(answer.mode if isinstance(answer, Stream) else str(answer))

    def _take(self, segment: Segment, streams: Sequence[tuple[str, Stream]]) -> None:
        together: list[float] = []
        for name, stream in streams:
            found = gaps(stream.at, segment)
            self.gaps.setdefault((name, segment.kind), []).extend(found)
            together += found
        self.p99s[segment.pair, segment.kind] = percentile(together, 0.99)

    def report(self) -> dict[str, Any]:
        """Between tokens, in ms: of all, and of those asked for directly and through the router.

        ``came_together`` is the share of tokens that came with the one before, quiet and with handoffs: where it is
        large, something between the engine and us was late, and their gaps of 0 lower every percentile.
        """
        rows = []
        for way, names in (("all", ("decode", "router")), ("decode", ("decode",)), ("router", ("router",))):
            quiet, busy = (
                [gap for name in names for gap in self.gaps.get((name, kind), [])] for kind in ("quiet", "handoffs")
            )
            if quiet and busy:
                ratio = percentile(busy, 0.99) / percentile(quiet, 0.99)
                together = [round(sum(gap == 0 for gap in each) / len(each), 4) for each in (quiet, busy)]
                row = {"asked": way, "quiet": spread(quiet), "handoffs": spread(busy), "p99_ratio": round(ratio, 4)}
                rows.append(row | {"came_together": together})
        pairs = sorted({pair for pair, _ in self.p99s})
        ratios = [self.p99s[pair, "handoffs"] / self.p99s[pair, "quiet"] for pair in pairs]
        return {
            "streams": self._bench.device.batch,
            "handoff_tokens": self._bench.device.batch_handoff_tokens,
            "every_s": self._bench.device.batch_every_s,
            "rows": rows,
            "pairs": len(pairs),
            "p99_ratio_median_of_pairs": round(statistics.median(ratios), 4) if ratios else None,
            "p99_ratios": [round(ratio, 4) for ratio in ratios],
            "handoff_ttft_ms": spread(self.handoff_ttft_s),
            "failed": self.failed,
        }


async def between_tokens(bench: Bench, rounds: int, until: float, into: dict[str, Any]) -> None:
    """Phase c: ``rounds`` pairs of segments, as many as end before ``until`` (time.monotonic())."""
    before = await bench.counters()
    await bench.stream("router", bench.body(bench.device.batch_handoff_tokens, 1))
    batch, pair = Batch(bench), 0
    while pair < rounds and time.monotonic() + PAIR_S + 3 < until:
        pairs = min(PAIRS_OF_A_BATCH, rounds - pair, max(1, int((until - time.monotonic() - 3) / PAIR_S)))
        try:
            with no_pauses():
                await batch.run(pair, pairs)
        except RequestFailed as error:
            batch.failed.append(str(error))
            if len(batch.failed) > rounds:
                break
        pair += pairs
    into |= batch.report() | {"counters": grown(before, await bench.counters())}
