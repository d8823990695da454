"""A long storm: thousands of requests while every instance is killed, started again, stopped and continued.

    make storm ARGS="--requests 2000 --out storm.json"
    make storm ARGS="--requests 10000 --per-s 20 --rounds 0 --faults-rate 0.05 --faults-every 7"   # failing transfers

Controller, router, prefill and decode instances of the demo model on this machine. Every request has a known answer;
a fifth of the clients leave at a random moment. Exit code 1 where anything went wrong: a wrong answer, an error that no
fault excuses, a hang, a block, pin or request that is still held a minute afterwards, or a fault that did not happen.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vllm_fleet.bench import storm
from vllm_fleet.bench.machine import facts
from vllm_fleet.bench.own_fleet import OwnFleet
from vllm_fleet.config.fleet import FleetConfig

MODEL = Path(__file__).parents[1] / "examples" / "recall" / "fleet-recall"
HANDOFF = {"lease_s": 5, "hold_s": 10, "load_s": 5, "prefill_s": 30}
"""Shorter than the defaults, so that leases end within the storm."""


FAULTS = ("cut", "truncate", "corrupt", "delay", "reorder")


def config(
    prefill: int, decode: int, deadline_s: float, *, faults_rate: float = 0.0, faults_every: int = 0
) -> FleetConfig:
    """The fleet that the storm goes over; transfers of such a share, and one in so many, go wrong."""
    faulty = {"checksums": "full", "faults": {"rate": faults_rate, "every": faults_every, "kinds": FAULTS}}
    tree = {
        "model": str(MODEL),
        "prefill": prefill,
        "decode": decode,
        "handoff": HANDOFF,
        "fabric": faulty if faults_rate or faults_every else {},
        "router": {"port": 0, "request_timeout_s": deadline_s},
        "vllm_args": ["--max-model-len=4096", "--max-num-batched-tokens=512"],  # chunks: decode reads in the middle
    }
    return FleetConfig.model_validate(tree)


def table(report: storm.Report) -> Table:
    """The storm in a few lines."""
    made = Table(title=f"{report.requests} requests in {report.seconds:.0f} s")
    made.add_column("what")
    made.add_column("count", justify="right")
    for outcome, count in sorted(report.outcomes.items()):
        made.add_row(f"requests: {outcome}", str(count))
    for outcome, count in sorted(report.handoffs.items()):
        made.add_row(f"handoffs: {outcome}", str(count))
    for kind in ("kill", "restart", "stop", "continue"):
        made.add_row(f"faults proved: {kind}", str(sum(fault["kind"] == kind for fault in report.faults)))
    made.add_row("right: as one instance, if not as known", str(report.model_errs))
    made.add_row("errors that a fault excuses", str(len(report.excused)))
    made.add_row("problems", str(len(report.problems)))
    made.add_row("slowest request, s", f"{report.slowest_s:.1f}")
    made.add_row("all given back after, s", " and ".join(f"{took:.1f}" for took in report.settled_s))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000, help="at least so many")
    parser.add_argument("--rounds", type=int, default=2, help="how often each instance is killed and stopped")
    parser.add_argument("--prefill", type=int, default=2)
    parser.add_argument("--decode", type=int, default=2)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--per-s", type=float, default=6.0, help="requests a second, in bursts")
    parser.add_argument("--deadline-s", type=float, default=60.0)
    parser.add_argument("--faults-rate", type=float, default=0.0, help="share of transfers that go wrong")
    parser.add_argument("--faults-every", type=int, default=0, help="one in so many transfers goes wrong")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", type=Path, default=None, help="keep the fleet's run folder and its logs here")
    parser.add_argument("--out", type=Path, default=None, help="write the JSON here")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the fleet is ended, too
    machine = facts()
    with tempfile.TemporaryDirectory(prefix="fleet-storm-") as folder:
        wanted_fleet = config(
            args.prefill,
            args.decode,
            args.deadline_s,
            faults_rate=args.faults_rate,
            faults_every=args.faults_every,
        )
        fleet = OwnFleet(wanted_fleet, args.logs or Path(folder))
        fleet.start()
        try:
            wanted = storm.Storm(
                args.requests,
                storm.lanes(fleet, args.rounds),
                concurrency=args.concurrency,
                per_s=args.per_s,
                deadline_s=args.deadline_s,
                seed=args.seed,
                recomputes=bool(args.faults_rate or args.faults_every),
            )
            report = storm.run(fleet, wanted)
        finally:
            fleet.close()
    Console().print(table(report))
    for problem in report.problems:
        Console().print(f"problem: {problem}", markup=False)
    if args.out:
        whole = {"command": " ".join(["python -m benchmarks.storm", *sys.argv[1:]]), "machine": machine}
        whole |= {"storm": asdict(wanted), "report": asdict(report)}
        args.out.write_text(json.dumps(whole, indent=2) + "\n")
    if report.problems:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
