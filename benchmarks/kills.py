"""Streams for half an hour while an instance is killed every ten seconds, each role in turn: none may break or differ.

    python -m benchmarks.kills --minutes 30 --out docs/benchmarks/2026-11-21-kills.json

Two prefill and two decode instances of the demo model on this machine; the next one is killed when the one before has
had ten seconds and another one is ready. Exit code 1 where a stream ended with an error, or differs from what an
instance alone answers.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from vllm_fleet.bench.kills import Kills, Plan
from vllm_fleet.bench.machine import facts
from vllm_fleet.bench.own_fleet import OwnFleet
from vllm_fleet.config.fleet import FleetConfig

MODEL = Path(__file__).parents[1] / "examples" / "recall" / "fleet-recall"


def config(prefill: int, decode: int) -> FleetConfig:
    """The fleet whose instances are killed."""
    tree = {
        "model": str(MODEL),
        "prefill": prefill,
        "decode": decode,
        "handoff": {"lease_s": 5, "hold_s": 10, "load_s": 5, "prefill_s": 30},
        "router": {"port": 0, "stall_s": 30.0},
        "vllm_args": ["--max-model-len=4096"],
    }
    return FleetConfig.model_validate(tree)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="about so long: a kill every ten seconds")
    parser.add_argument("--kills", type=int, help="exactly so many instead")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    given = parser.parse_args()
    plan = Plan(kills=given.kills or int(given.minutes * 6), streams=given.streams)
    if given.kills is None:
        plan = replace(plan, seconds_max=given.minutes * 60)
    with tempfile.TemporaryDirectory() as home:
        fleet = OwnFleet(config(prefill=2, decode=2), Path(home))
        fleet.start()
        try:
            report = Kills(fleet, plan, MODEL.name).run()
        finally:
            fleet.close()
    found = {"machine": facts(), "command": " ".join(["python -m benchmarks.kills", *sys.argv[1:]]), **report.plain()}
    text = json.dumps(found, indent=1)
    if given.out is not None:
        given.out.write_text(text + "\n")
    print(text)
    sys.exit(1 if report.problems else 0)


if __name__ == "__main__":
    main()
