"""``python -m tests.sim --seed 7 [--seeds N]``: run simulated fleets and print what happened."""

from __future__ import annotations

import argparse
import sys
import time

from tests.sim.world import run_seed


def main() -> int:
    """0 when every promise held under every seed."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description="Simulated fleets under faults.")
    parser.add_argument("--seed", type=int, default=1, help="the (first) seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, one after the other")
    given = parser.parse_args()
    began = time.monotonic()
    outcomes = [run_seed(seed) for seed in range(given.seed, given.seed + given.seeds)]
    failed = [outcome for outcome in outcomes if outcome.broken]
    for outcome in outcomes if given.seeds == 1 else failed:
        print(outcome.summary())
    turns = sum(outcome.counts["turns"] for outcome in outcomes)
    print(
        f"{given.seeds} fleets, {turns} turns of the controller, {time.monotonic() - began:.1f} s, {len(failed)} failed"
    )
    if failed:
        print("failing seeds: " + " ".join(str(outcome.seed) for outcome in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
