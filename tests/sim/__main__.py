"""``python -m tests.sim --seed 7 [--seeds N]``: run simulated fleets and print what happened."""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing

from tests.sim import lifecycle, router, world
from tests.sim.seeds import SEEDS_FILE, WORLDS, World

CHUNK = 50
PROGRESS_S = 10.0
RUN_S_MAX = 600.0  # one chunk: 50 fleets take seconds


def run_here(where: World, seed: int) -> tuple[str, str]:
    """What broke under one seed (empty: nothing), and some lines for people."""
    if where == "controller":
        found = world.run_seed(seed)
        return found.broken, found.summary()
    if where == "router":
        answered = router.run_seed(seed)
        return answered.broken, answered.summary()
    outcome = lifecycle.run_seed(seed)
    seen = ", ".join(f"{name} {count}" for name, count in sorted(outcome.counts.items()))
    return outcome.broken, f"seed {seed}: {outcome.broken or 'all promises held'}\n  seen: {seen}"


def chunk(where: World, first: int, seeds: int) -> dict[int, str]:
    """What broke under seeds of a range, found by another process."""
    argv = [sys.executable, "-m", "tests.sim", "--world", where, "--seed", str(first), "--seeds", str(seeds), "--raw"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=RUN_S_MAX, check=False)
    except subprocess.TimeoutExpired:
        return {first: f"seeds {first} to {first + seeds - 1} did not end within {RUN_S_MAX:g} s"}
    if done.returncode:
        return {first: f"seeds {first} to {first + seeds - 1} did not end in order: {done.stderr[-500:]}"}
    return {int(seed): broken for seed, broken in json.loads(done.stdout).items()}


def many(worlds: list[World], first: int, seeds: int, jobs: int) -> Generator[tuple[World, int, dict[int, str]]]:
    """World, number of seeds and what broke, chunk by chunk."""
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {
            pool.submit(chunk, where, at, min(CHUNK, first + seeds - at)): (where, min(CHUNK, first + seeds - at))
            for at in range(first, first + seeds, CHUNK)
            for where in worlds
        }
        try:
            for done in as_completed(waiting):
                where, count = waiting[done]
                yield where, count, done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def run_many(given: argparse.Namespace, worlds: list[World]) -> list[tuple[World, int, str]]:
    """Every world under every seed; says how far it is now and then."""
    began = told = time.monotonic()
    failed: list[tuple[World, int, str]] = []
    ran = 0
    with closing(many(worlds, given.seed, given.seeds, given.jobs)) as chunks:
        for where, count, broken in chunks:
            ran += count
            for seed, what in broken.items():
                failed.append((where, seed, what))
                print(f"{where} {seed}: BROKEN: {what}", flush=True)
            if time.monotonic() - told >= PROGRESS_S:
                told = time.monotonic()
                print(f"{ran} of {given.seeds * len(worlds)} fleets, {told - began:.0f} s", flush=True)
    print(f"{ran} fleets ({', '.join(worlds)}), {time.monotonic() - began:.1f} s, {len(failed)} failed")
    return sorted(failed)


def main() -> int:
    """0 when every promise held under every seed."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description="Simulated fleets under faults.")
    parser.add_argument("--seed", type=int, default=1, help="the (first) seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, one after the other")
    parser.add_argument("--world", choices=[*WORLDS, "all"], default="all", help="what is simulated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes to use for many seeds")
    parser.add_argument("--keep", action="store_true", help="add failing seeds to tests/sim/seeds.txt")
    parser.add_argument("--raw", action="store_true", help="print what broke as JSON, in this process")
    given = parser.parse_args()
    worlds: list[World] = list(WORLDS) if given.world == "all" else [given.world]
    if given.raw or given.seeds > 1:
        logging.getLogger("vllm_fleet").setLevel(logging.CRITICAL)  # torn journals are expected, not worth a line each
    if given.raw:
        broken = {seed: run_here(worlds[0], seed)[0] for seed in range(given.seed, given.seed + given.seeds)}
        print(json.dumps({seed: what for seed, what in broken.items() if what}))
        return 0
    if given.seeds > 1:
        failed = run_many(given, worlds)
    else:
        failed = []
        for where in worlds:
            what, summary = run_here(where, given.seed)
            print(f"{where}: {summary}")
            failed += [(where, given.seed, what)] if what else []
    if failed:
        print("failing seeds: " + ", ".join(f"{where} {seed}" for where, seed, _ in failed))
        print("again with: python -m tests.sim --world WORLD --seed SEED")
    if failed and given.keep:
        with SEEDS_FILE.open("a") as file:
            file.writelines(f"{where} {seed}  # {what[:100]}\n" for where, seed, what in failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
