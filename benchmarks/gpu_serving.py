"""Serving through the fleet on two GPUs, beside NixlConnector's handoffs and beside plain instances, in one run.

    python -m benchmarks.gpu_serving --model DIR --json serving.json

Starts everything itself: controller, router and our prefill and decode, the same pair with NixlConnector, and a plain
instance on each GPU; prefill and plain-0 share GPU 0, decode and plain-1 GPU 1. One arm is asked at a time. Phases:
  a  what decode needs on top of a request whose KV it has: streamed, sequential, NixlConnector
  b  TTFT through the router beside one plain instance
  c  time between tokens of a running decode batch, with handoffs arriving and without
  d  loads arriving at a rate: one prefill and one decode instance beside two plain ones with chunked prefill
The JSON is written after each phase; what fails is in it, and does not stop the rest. Without GPUs: --device cpu.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

from benchmarks.serving_batch import between_tokens
from benchmarks.serving_device import DEVICES, Device
from benchmarks.serving_load import Bench
from benchmarks.serving_mix import loads
from benchmarks.serving_phases import answers, first_tokens, handoffs
from benchmarks.serving_start import KINDS, Specs, Started, running
from benchmarks.serving_table import table
from vllm_fleet.bench.machine import facts

WEIGHTS: Mapping[str, float] = {"a": 1.0, "b": 0.9, "c": 0.9, "d": 2.2}
"""How the time that is left is shared among the phases that are left."""
NEEDS: Mapping[str, Sequence[str]] = {"a": (), "b": ("router", "plain-0"), "c": ("router",), "d": ("router", "plain-0")}
WARM_S = 30.0
GRACE_S = 20.0
"""A phase that has not ended this long after its time is cut off."""
STOPPING_S = 12.0
KEEPALIVE_S = 2.0
"""Shorter than the servers': a connection is not used just as its server closes it."""
Phase = Callable[[dict[str, Any]], Awaitable[None]]


class Report:
    """The JSON file, written anew whenever there is more to say."""

    def __init__(self, file: Path | None, content: dict[str, Any]) -> None:
        self._file, self.content = file, content

    def write(self) -> None:
        if self._file is not None:
            self._file.write_text(json.dumps(self.content, indent=1) + "\n")


async def guarded(report: Report, name: str, phase: Phase, seconds: float) -> None:
    """Run one phase; whatever becomes of it is in the report, and nothing but our own end is raised."""
    into: dict[str, Any] = report.content.setdefault(name, {})
    began = time.monotonic()
    task = asyncio.ensure_future(phase(into))
    try:
        await asyncio.wait({task}, timeout=max(0.0, seconds))
    finally:
        cut_off = not task.done()
        task.cancel()
        await asyncio.wait({task}, timeout=GRACE_S)
    if cut_off:
        into["error"] = f"cut off after {seconds:.0f} s"
    elif (error := task.exception()) is not None:
        into["error"] = f"{type(error).__name__}: {error}"
    into["took_s"] = round(time.monotonic() - began, 1)
    report.write()
    print(f"{name}: {into['took_s']} s {into.get('error', '')}", flush=True)


async def warm_up(bench: Bench, into: dict[str, Any]) -> None:
    """Every way of asking, twice: links are made, kernels compiled."""
    instances = [name for name in bench.started.urls if name not in ("controller", "router", "decode", "nixl-decode")]
    for _ in range(2):
        for name in [*instances, "router"]:
            if bench.started.has(name):
                answer = await bench.stream(name, bench.body(bench.device.ttft_tokens[0], 16))
                into[name] = round(1e3 * answer.ttft_s, 1)


def phase_of(name: str, bench: Bench, rounds: int, ends: float) -> Phase:
    """Phase a, b, c or d, to end at ``ends`` (time.monotonic())."""
    match name:
        case "a":
            return lambda into: handoffs(bench, rounds, ends, into)
        case "b":
            return lambda into: first_tokens(bench, rounds, ends, into)
        case "c":
            return lambda into: between_tokens(bench, rounds, ends, into)
        case _:
            return lambda into: loads(bench, bench.device.loads, ends, into)


async def measure(started: Started, device: Device, args: argparse.Namespace, report: Report, until: float) -> None:
    """All phases asked for, before ``until`` (time.monotonic())."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S)
    headers = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
        bench = Bench(session, started, device, args.model, random.Random(args.seed))
        await run_phases(bench, report, args.phases.split(","), args.rounds, until)


async def run_phases(bench: Bench, report: Report, phases: Sequence[str], rounds: int, until: float) -> None:
    """Each in its turn, with its share of the time that is left."""
    await guarded(report, "warm_up", lambda into: warm_up(bench, into), WARM_S)
    if bench.started.has("router", "plain-0"):
        await guarded(report, "answers", lambda into: answers(bench, into), WARM_S)
    left = [name for name in WEIGHTS if name in phases]
    while left:
        name, seconds = left[0], until - time.monotonic()
        seconds *= WEIGHTS[name] / sum(WEIGHTS[each] for each in left)
        missing = [each for each in NEEDS[name] if not bench.started.has(each)]
        if missing:
            report.content[name] = {"error": f"not started: {', '.join(missing)}"}
        else:
            phase = phase_of(name, bench, rounds, time.monotonic() + seconds)
            await guarded(report, name, phase, seconds + GRACE_S)
        left.remove(name)


def gpus() -> list[str]:
    """Name and driver of each GPU; empty where nvidia-smi is not to be had."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    with contextlib.suppress(subprocess.SubprocessError, OSError):
        return subprocess.check_output(command, text=True, timeout=20).splitlines()
    return []


async def benchmark(args: argparse.Namespace, device: Device, report: Report) -> None:
    """Start everything, measure, end everything; without CUDA graphs where no instance starts with them."""
    until = time.monotonic() + 60 * args.minutes - STOPPING_S
    report.content |= {
        "command": "python -m benchmarks.gpu_serving " + " ".join(sys.argv[1:]),
        "machine": facts() | {"gpus": gpus()},
        "device": dataclasses.asdict(device),
    }
    for eager in (True,) if args.eager else (False, True):
        folder = args.logs or Path(tempfile.mkdtemp(prefix="fleet-bench-"))
        (folder / "state").mkdir(parents=True, exist_ok=True)
        specs = Specs(folder, args.model.resolve(), device, eager=eager)
        processes = list(specs.of(device.kinds))
        report.content["commands"] = {spec.name: list(spec.argv[1:]) for spec in processes}
        report.write()
        async with running(processes, specs.token, folder, args.start_s) as started:
            report.content |= {"ready_s": started.ready_s, "not_started": started.failed}
            report.write()
            print(f"ready: {started.ready_s}; not started: {list(started.failed)}", flush=True)
            if started.urls.keys() - {"controller", "router"}:
                await measure(started, device, args, report, until)
                return


def settings() -> tuple[argparse.Namespace, Device]:
    """The command line, and the device with what it changes there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder with config and tokenizer")
    parser.add_argument("--device", choices=list(DEVICES), default="cuda")
    parser.add_argument("--phases", default="a,b,c,d")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything, start and end included")
    parser.add_argument("--start-s", type=float, default=200.0, help="what is not ready by then is left out")
    parser.add_argument("--rounds", type=int, default=21, help="of phases a and b; pairs of segments of phase c")
    parser.add_argument("--tokens", help="prompts of phase a, as 1024,8192")
    parser.add_argument("--ttft-tokens", help="prompts of phase b")
    parser.add_argument("--loads", help="of phase d: mixed or long at a rate, as mixed@4,long@4")
    parser.add_argument("--transports", help="of our connector, best first")
    parser.add_argument("--kinds", help=f"what to start, of {','.join(KINDS)}")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs, in any instance")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    parser.add_argument("--logs", type=Path, default=None, help="keep logs and settings in this folder")
    args = parser.parse_args()
    given: dict[str, Any] = {}
    for key, value in (("handoff_tokens", args.tokens), ("ttft_tokens", args.ttft_tokens)):
        if value:
            given[key] = tuple(map(int, value.split(",")))
    for key, value in (("loads", args.loads), ("transports", args.transports), ("kinds", args.kinds)):
        if value:
            given[key] = tuple(value.split(","))
    return args, dataclasses.replace(DEVICES[args.device], **given)


async def cancelled_by_signals(work: Awaitable[None]) -> None:
    """SIGTERM and SIGINT cancel the work, which ends every process it has started."""
    task = asyncio.ensure_future(work)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    await task


def main() -> None:
    args, device = settings()
    report = Report(args.json, {})
    try:
        uvloop.run(cancelled_by_signals(benchmark(args, device, report)))
    finally:
        report.write()
        print(table(report.content), flush=True)


if __name__ == "__main__":
    main()
