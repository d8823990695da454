"""Damaged and random bytes at everything of the fabric that reads bytes from others, and at a live endpoint.

    make fuzz

Seeded. Stops at the first error that a reader does not declare; a reader that hangs is shown with its stack.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table
from tests.fuzz.live import Live
from tests.fuzz.targets import Owned, Target, codecs, feed, mutate

from vllm_fleet.bench.machine import facts

LIVE_SHARE = 0.02  # of all inputs; each session makes a connection
CONNECT_SHARE = 0.005  # each may start a thread
HANG_S = 60.0


@dataclass
class Row:
    """What one target did."""

    name: str
    inputs: int = 0
    seconds: float = 0.0
    slowest_ms: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)


def resident_mib() -> float:
    """Resident memory of this process."""
    return float(psutil.Process().memory_info().rss) / 2**20


def counts() -> list[int]:
    """Threads and file descriptors."""
    return [threading.active_count(), len(os.listdir("/proc/self/fd"))]


def fuzz(target: Target, inputs: int, rng: random.Random) -> Row:
    """Feed one target; the time is the target's alone."""
    row = Row(target.name, inputs)
    for index in range(inputs):
        if index % 1000 == 0:
            faulthandler.dump_traceback_later(HANG_S, exit=True)
        received = mutate(rng, target.samples)
        began = time.perf_counter()
        outcome = feed(target, received)
        took = time.perf_counter() - began
        row.outcomes[outcome] += 1
        row.seconds += took
        row.slowest_ms = max(row.slowest_ms, took * 1e3)
    return row


def sessions(name: str, act: Callable[[random.Random], int], inputs: int, rng: random.Random) -> Row:
    """Sessions with a live endpoint until it has read so many inputs."""
    row = Row(name)
    while row.inputs < inputs:
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        began = time.perf_counter()
        row.inputs += act(rng)
        took = time.perf_counter() - began
        row.seconds += took
        row.slowest_ms = max(row.slowest_ms, took * 1e3)
        row.outcomes["ended by the endpoint"] += 1
    return row


def measure(inputs: int, seed: int) -> list[Row]:
    """All targets, each with its own generator."""
    pure = codecs()
    live, owned = Live(), Owned()
    try:
        checks = owned.targets()
        connects = [target for target in checks if target.name.startswith("connect")]
        pure += [target for target in checks if target not in connects]
        fixed = int(inputs * LIVE_SHARE) + int(inputs * LIVE_SHARE / 4) + len(connects) * int(inputs * CONNECT_SHARE)
        weights = sum(target.weight for target in pure)
        rows = [
            fuzz(target, -(-(inputs - fixed) * target.weight // weights), random.Random(f"{seed}/{target.name}"))
            for target in pure
        ]
        rows += [
            fuzz(target, int(inputs * CONNECT_SHARE), random.Random(f"{seed}/{target.name}")) for target in connects
        ]
        questions = random.Random(f"{seed}/live questions")
        rows.append(sessions("live endpoint, questions", live.session, int(inputs * LIVE_SHARE), questions))
        strangers = random.Random(f"{seed}/live handshakes")
        rows.append(sessions("live endpoint, handshakes", live.stranger, int(inputs * LIVE_SHARE / 4), strangers))
        if not live.serves():
            raise SystemExit("the live endpoint does not serve any more")
    finally:
        faulthandler.cancel_dump_traceback_later()
        live.close()
        owned.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    machine = facts()
    logging.disable(logging.CRITICAL)  # a line for each refused connection
    measure(5_000, args.seed + 1)  # imports, pools and caches are there before memory is measured
    before, rss_before = counts(), resident_mib()
    began = time.monotonic()
    rows = measure(args.inputs, args.seed)
    took = time.monotonic() - began
    until = time.monotonic() + 10
    while counts() > before and time.monotonic() < until:
        time.sleep(0.05)
    after, rss_after = counts(), resident_mib()
    total = sum(row.inputs for row in rows)
    table = Table(title=f"{total:,} damaged inputs, seed {args.seed}: no undeclared error, no hang")
    for heading in ("reader", "inputs", "inputs/s", "slowest, ms", "outcomes"):
        table.add_column(heading, justify="left" if heading in ("reader", "outcomes") else "right")
    for row in rows:
        outcomes = ", ".join(f"{name} {count:,}" for name, count in row.outcomes.most_common())
        table.add_row(
            row.name, f"{row.inputs:,}", f"{row.inputs / row.seconds:,.0f}", f"{row.slowest_ms:.2f}", outcomes
        )
    Console(width=140).print(table)
    print(f"resident memory {rss_before:.1f} -> {rss_after:.1f} MiB; threads, descriptors {before} -> {after}")
    if any(now > then for now, then in zip(after, before, strict=True)):
        raise SystemExit("a thread or a file descriptor was left behind")
    if args.json:
        report = {
            "command": f"make fuzz ARGS='--inputs {args.inputs} --seed {args.seed}'",
            "machine": machine,
            "inputs": total,
            "seconds": round(took, 1),
            "rss_mib": {"before": round(rss_before, 1), "after": round(rss_after, 1)},
            "threads_and_descriptors": {"before": before, "after": after},
            "rows": [
                {
                    "reader": row.name,
                    "inputs": row.inputs,
                    "inputs_per_s": round(row.inputs / row.seconds),
                    "slowest_ms": round(row.slowest_ms, 3),
                    "outcomes": dict(row.outcomes),
                }
                for row in rows
            ],
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
