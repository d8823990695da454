"""What a controller costs with a thousand instances: registrations at once, heartbeats, changes to watchers, memory.

    make bench-controller ARGS="--seconds 30 --out controller.json"

The controller is a process of its own on one core, with its journal on a disk; mock members and watchers are this
process, on another core. Exit code 1 where a request failed or an instance was suspected.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.controller_load import Fleet, Target
from vllm_fleet.bench.machine import facts
from vllm_fleet.config.connector import bearer
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.net.control_client import ControlClient

HEARTBEAT_S = 0.5
OTHERS_PERCENT_MAX = 20


def quantiles(took_s: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile and worst, in milliseconds."""
    ordered = sorted(took_s)
    at = {"p50_ms": 0.5, "p99_ms": 0.99, "worst_ms": 1.0}
    return {
        name: round(1e3 * ordered[min(int(share * len(ordered)), len(ordered) - 1)], 2) for name, share in at.items()
    }


def fsync_ms(folder: Path) -> float:
    """What one small append costs on this disk, by itself: the median of 50."""
    took = []
    with (folder / "probe").open("wb", buffering=0) as probe:
        for _ in range(50):
            began = time.perf_counter()
            probe.write(b"x" * 256)
            os.fsync(probe.fileno())
            took.append(time.perf_counter() - began)
    return round(1e3 * sorted(took)[25], 2)


@contextlib.contextmanager
def controller(folder: Path, core: int, profile: Path | None) -> Iterator[tuple[Target, psutil.Process]]:
    """A controller process pinned to ``core``."""
    token = secrets.token_bytes(32)
    token_file, settings = folder / "token", folder / "controller.json"
    token_file.write_text(token.hex())
    token_file.chmod(0o600)
    tree = {"fleet": "bench", "token_file": str(token_file), "state_dir": str(folder / "state")}
    settings.write_text(json.dumps(tree | {"heartbeat_s": HEARTBEAT_S}))
    watched = [] if profile is None else ["-m", "cProfile", "-o", str(profile)]
    with (folder / "controller.log").open("wb") as log:
        command = [sys.executable, *watched, "-m", "vllm_fleet.controller", "--settings", str(settings)]
        child = subprocess.Popen(command, stderr=log)
    try:
        psutil.Process(child.pid).cpu_affinity([core])
        url = ""
        deadline = time.monotonic() + 30
        while not url:
            text = (folder / "controller.log").read_text()
            url = text.partition('url="')[2].partition('"')[0]
            if child.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the controller did not start:\n{text}")
            time.sleep(0.05)
        host, _, port = url.removeprefix("http://").rpartition(":")
        yield Target(host, int(port), bearer(token)), psutil.Process(child.pid)
    finally:
        child.terminate()
        child.wait(timeout=30)


class Gauge:
    """The controller's processor time and memory between two moments."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self._began, self._before = time.perf_counter(), process.cpu_times()
        self._busy_before, self._ours_before = _busy_s(), self._ours_s()

    def read(self) -> dict[str, float]:
        """Per cent of one core since the beginning, and resident memory now. ``others``: what else ran on the machine:
        on a busy one every request finds cold caches and costs two or three times as much.
        """
        now, wall_s = self._process.cpu_times(), time.perf_counter() - self._began
        user, system = now.user - self._before.user, now.system - self._before.system
        return {
            "seconds": round(wall_s, 1),
            "cpu_s": round(user + system, 3),
            "core_percent": round(100 * (user + system) / wall_s, 2),
            "user_percent": round(100 * user / wall_s, 2),
            "system_percent": round(100 * system / wall_s, 2),
            "others_percent": round(
                100 * (_busy_s() - self._busy_before - self._ours_s() + self._ours_before) / wall_s
            ),
            "rss_mib": round(self._process.memory_info().rss / 2**20, 1),
        }

    def _ours_s(self) -> float:
        spent = self._process.cpu_times()
        return time.process_time() + spent.user + spent.system


def _busy_s() -> float:
    spent = psutil.cpu_times()
    return float(spent.user + spent.nice + spent.system)


async def measure(args: argparse.Namespace, target: Target, process: psutil.Process) -> dict[str, Any]:
    """Every figure, in one go."""
    rss_empty_mib = round(process.memory_info().rss / 2**20, 1)
    fleet = Fleet(target)
    gauge = Gauge(process)
    whole_s, each_s = await fleet.register_at_once(args.members)
    registering = {"all_s": round(whole_s, 3), **quantiles(each_s), "cpu_s": gauge.read()["cpu_s"]}
    fleet.begin(HEARTBEAT_S, random.Random(args.seed))
    await asyncio.sleep(2.0)

    for member in fleet.members:
        member.answers_s.clear()
        member.skipped = 0
    gauge = Gauge(process)
    await asyncio.sleep(args.seconds)
    beats = {**gauge.read(), **quantiles([took for member in fleet.members for took in member.answers_s])}
    answered = sum(len(member.answers_s) for member in fleet.members)
    beats["skipped"] = sum(member.skipped for member in fleet.members)
    beats |= {"per_s": round(answered / beats["seconds"], 1), "us_each": round(1e6 * beats["cpu_s"] / answered, 1)}

    snapshots_s = await fleet.watch(args.watchers)
    gauge = Gauge(process)
    told_s: list[float] = []
    for number in range(args.changes):
        told_s += await fleet.change(f"late-{number}")
        await asyncio.sleep(1 / args.changes_per_s)
    watching = {"snapshots_s": round(snapshots_s, 3), **quantiles(told_s), **gauge.read()}
    snapshot = await asyncio.to_thread(ControlClient(f"http://{target.host}:{target.port}", target.bearer).snapshot,
                                       Deadline.after(10, "bench"))  # fmt: skip
    problems = [f"{member.name}: {member.failures} requests failed" for member in fleet.members if member.failures]
    problems += [f"{member.name} is {member.state}" for member in snapshot.members if member.state != "ready"]
    if len(snapshot.members) != args.members:
        problems.append(f"{len(snapshot.members)} members at the end, not {args.members}")
    fleet.close()
    return {
        "rss_empty_mib": rss_empty_mib,
        "registering": registering,
        "heartbeats": beats,
        "watching": watching,
        "problems": problems,
    }


def table(args: argparse.Namespace, found: dict[str, Any]) -> Table:
    """The figures and what was wanted."""
    registering, beats, watching = found["registering"], found["heartbeats"], found["watching"]
    made = Table(title=f"a controller, {args.members} instances, {args.watchers} watchers")
    for name, justify in (("what", "left"), ("found", "right"), ("wanted", "right")):
        made.add_column(name, justify="right" if justify == "right" else "left")
    made.add_row("all registered at once, s", f"{registering['all_s']:.2f}", "")
    made.add_row("  an instance's wait, p99, ms", f"{registering['p99_ms']:.0f}", "")
    made.add_row(f"heartbeats ({beats['per_s']:.0f}/s), % of a core", f"{beats['core_percent']:.1f}", "< 10")
    made.add_row("  each, µs", f"{beats['us_each']:.0f}", "")
    made.add_row("  answered in, p99, ms", f"{beats['p99_ms']:.1f}", "")
    made.add_row("all watchers connected, with a snapshot, s", f"{watching['snapshots_s']:.2f}", "")
    made.add_row("a change at every watcher, p50, ms", f"{watching['p50_ms']:.1f}", "")
    made.add_row("  p99, ms", f"{watching['p99_ms']:.1f}", "< 50")
    made.add_row("  heartbeats and watchers, % of a core", f"{watching['core_percent']:.1f}", "")
    made.add_row("memory, MiB", f"{watching['rss_mib']:.0f}", "< 200")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--members", type=int, default=1000)
    parser.add_argument("--watchers", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=30.0, help="of heartbeats alone")
    parser.add_argument("--changes", type=int, default=100, help="members that come and go while all are watched")
    parser.add_argument("--changes-per-s", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="where the journal goes: a folder on a real disk")
    parser.add_argument("--profile", type=Path, default=None, help="write a cProfile of the controller here")
    parser.add_argument("--out", type=Path, default=None, help="write the JSON here")
    args = parser.parse_args()
    machine = facts()
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1]})
    with tempfile.TemporaryDirectory(prefix="fleet-controller-", dir=args.folder) as folder:
        disk_ms = fsync_ms(Path(folder))
        with controller(Path(folder), cores[0], args.profile) as (target, process):
            found = uvloop.run(measure(args, target, process))
    Console().print(table(args, found))
    busy = max(found["heartbeats"]["others_percent"], found["watching"]["others_percent"])
    if busy > OTHERS_PERCENT_MAX:
        Console().print(f"not a quiet machine: other processes used {busy} % of a core; these figures are too high")
    Console().print(f"one fsync on that disk: {disk_ms} ms; {machine['cpu']}, {machine['cores']} cores")
    for problem in found["problems"][:20]:
        Console().print(f"problem: {problem}", markup=False)
    if args.out:
        whole: dict[str, Any] = {
            "command": " ".join(["python -m benchmarks.controller", *sys.argv[1:]]),
            "machine": machine,
        }
        whole |= {"members": args.members, "watchers": args.watchers, "fsync_ms": disk_ms, **found}
        args.out.write_text(json.dumps(whole, indent=1) + "\n")
    if found["problems"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
