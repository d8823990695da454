"""The stages of one read over cuda_ipc, for gpu_reads.py."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.gpu_kernels import BLOCK, POOL_BYTES, REGIONS
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.fabric.plan import BlockCopyPlan, BlockShape, plan_blocks
from vllm_fleet.fabric.transports.cuda import reads
from vllm_fleet.fabric.transports.cuda.direct import DirectTransfer, IpcLink

SETTLE_S = 500e-6
BLOCKS = POOL_BYTES // REGIONS // BLOCK  # in a region
SHAPES = [BlockShape(BLOCK, BLOCK, BLOCKS)] * REGIONS


def soon() -> Deadline:
    return Deadline.after(60, "benchmark")


def make_plan(total: int) -> BlockCopyPlan:
    """As many random blocks in every region as make ``total`` bytes."""
    count = total // BLOCK // REGIONS
    source, target = (np.random.default_rng(seed).permutation(BLOCKS)[:count].tolist() for seed in (1, 2))
    return plan_blocks(SHAPES, source, target, "benchmark")


def settle() -> None:
    """What prepare() started has ended; no sleep, from which the processor would have to wake."""
    until = time.perf_counter() + SETTLE_S
    while time.perf_counter() < until:
        pass


def await_word(words: memoryview, value: int) -> None:
    """Look until the first word is ``value``."""
    deadline = time.perf_counter() + 30
    while words[0] != value:
        if time.perf_counter() > deadline:
            raise TimeoutError("the copy's end was not seen within 30 s")


class Reading:
    """A link's reads of one plan, made anew each time."""

    def __init__(self, link: IpcLink, plan: BlockCopyPlan) -> None:
        self.link, self.plan = link, plan

    def renew(self) -> None:
        self.plan = replace(self.plan)

    def prepare(self) -> None:
        self.renew()
        self.link.prepare(self.plan)
        settle()

    def read(self) -> None:
        self.link.read(self.plan).wait(soon())


class Stopwatch:
    """Adds up the time spent in functions that are replaced for as long as it is used (0.3 us more for each call)."""

    def __init__(self, link: IpcLink) -> None:
        queue = link._copier._reads._queue
        self.spent: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self._replaced: list[tuple[Any, str, Any]] = []
        for stage, place, name in (
            ("bounds", reads, "check_plan"),
            ("table", reads, "fill"),
            ("launch", queue, "start"),
        ):
            self._replace(stage, place, name)

    def _replace(self, stage: str, place: Any, name: str) -> None:
        original = getattr(place, name)

        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return original(*arguments)
            finally:
                self.spent[stage] = self.spent.get(stage, 0.0) + (time.perf_counter() - began) * 1e6
                self.calls[stage] = self.calls.get(stage, 0) + 1

        setattr(place, name, timed)
        self._replaced.append((place, name, original))

    def reset(self) -> None:
        self.spent, self.calls = {}, {}

    def close(self) -> None:
        for place, name, original in self._replaced:
            setattr(place, name, original)


def stages(link: IpcLink, total: int, rounds: int, *, prepared: bool) -> dict[str, float]:
    """Microseconds of each stage of one read; medians. "until seen": from read()'s return to the nonce's arrival."""
    reading, watch = Reading(link, make_plan(total)), Stopwatch(link)
    found: dict[str, list[float]] = {}
    for turn in range(rounds + 2):
        reading.renew()
        watch.reset()
        began = time.perf_counter()
        if prepared:
            link.prepare(reading.plan)
            prepare = (time.perf_counter() - began) * 1e6
            settle()
            watch.reset()
        start = time.perf_counter()
        transfer = link.read(reading.plan)
        returned = time.perf_counter()
        assert isinstance(transfer, DirectTransfer), "the link's thread was given the read"
        await_word(transfer._slot.seen, transfer._first)
        seen = time.perf_counter()
        transfer.wait(soon())
        ended = time.perf_counter()
        if turn < 2:
            continue
        one = {
            "prepare (before)": prepare if prepared else 0.0,
            "bounds": watch.spent.get("bounds", 0.0),
            "table": watch.spent.get("table", 0.0),
            "launch": watch.spent["launch"],
            "launches": float(watch.calls["launch"]),
            "read() in all": (returned - start) * 1e6,
            "until seen": (seen - returned) * 1e6,
            "after": (ended - seen) * 1e6,
        }
        for name, value in one.items():
            found.setdefault(name, []).append(value)
    watch.close()
    return {name: statistics.median(values) for name, values in found.items()}


def looks(link: IpcLink) -> dict[str, float]:
    """Microseconds of one look at a running transfer: at host memory, as done() looks, and at the event."""
    transfer = link.read(replace(make_plan(1 << 30)))
    assert isinstance(transfer, DirectTransfer)
    count, found = 50, {}
    words, first = transfer._slot.seen, transfer._first
    ways: dict[str, Callable[[], bool]] = {
        "host memory": lambda: bool(words[0] == first),
        "done()": transfer.done,
        "event": transfer._slot.event.passed,
    }
    for name, look in ways.items():
        began = time.perf_counter()
        for _ in range(count):
            look()
        found[name] = (time.perf_counter() - began) / count * 1e6
    transfer.wait(soon())
    return found
