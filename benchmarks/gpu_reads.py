"""One read over cuda_ipc, step by step: what starting it costs, what the GPU takes, what is lost until it is seen.

    python -m benchmarks.gpu_reads --json figures.json

Two processes, one GPU each (or one for both): scattered 32 KiB blocks. Medians of interleaved rounds of wall-clock
time, in microseconds. A plan is made anew for every read, before the clock starts, as a handoff makes it (fabric.plan);
a prepared one was given to Link.prepare() half a millisecond earlier. Under a minute of GPU time.
"""

from __future__ import annotations

import argparse
import base64
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.gpu_kernels import BLOCK, bare, scattered, side
from benchmarks.gpu_read_stages import Reading, await_word, looks, make_plan, soon, stages
from vllm_fleet.bench.machine import facts
from vllm_fleet.fabric.contract import KVPool
from vllm_fleet.fabric.plan import Ints
from vllm_fleet.fabric.transports.cuda import driver, kernels
from vllm_fleet.fabric.transports.cuda.direct import IpcLink
from vllm_fleet.fabric.transports.cuda.mapping import Mapping
from vllm_fleet.fabric.transports.cuda_ipc import CudaIpcDetails
from vllm_fleet.wire.fabric import PoolHandle

SIZES = (32 << 20, 128 << 20, 1 << 30, 4 << 30)
CEILING = "contiguous peer copy"


class Way(NamedTuple):
    """``before`` is done before the clock starts."""

    run: Callable[[], None]
    before: Callable[[], None] = lambda: None


def seen_in_host_memory(device: int, stream: driver.Stream, rows: Ints, at: int, nonce: bytes) -> Way:
    """The reading kernel alone, its table on the GPU, its end seen as a transfer sees it."""
    queue = kernels.ReadQueue(device, stream.cuda_stream, at)
    pinned, table = driver.Pinned(device, rows.nbytes + 64), driver.allocate(device, rows.nbytes)
    pinned.words[8:] = rows.reshape(-1)
    with driver.current(device):
        driver.copy_in(table, pinned.address + 64, rows.nbytes, stream.cuda_stream)
    stream.synchronize()
    seen, first = pinned.words[:4].data, int(np.frombuffer(nonce, np.int64)[0])

    def clear() -> None:
        seen[0] = 0

    def run() -> None:
        with driver.current(device):
            queue.start(table, len(rows), pinned.address)
        await_word(seen, first)

    return Way(run, clear)


def ways(total: int, device: int, mapping: Mapping, nonce: bytes, pool: KVPool, link: IpcLink) -> dict[str, Way]:
    """Each way to copy ``total`` bytes, by name."""
    stream = driver.Stream(device)
    own = np.array([region.address for region in pool.regions], np.int64)
    region, offset = scattered(total, 1)
    own_region, own_offset = scattered(total, 2)
    theirs, ours = mapping.regions[region] + offset, own[own_region] + own_offset
    nbytes = np.full(len(ours), BLOCK, np.int64)
    rows = np.stack([theirs, ours, nbytes, nbytes], axis=1)

    def contiguous() -> None:
        with driver.current(device):
            driver.copy_across(int(own[0]), int(mapping.regions[0]), total, stream.cuda_stream)
        stream.synchronize()

    setting = (kernels.PROGRAMS, kernels.WARPS, kernels.TILE_BYTES)
    reading = Reading(link, make_plan(total))
    return {
        CEILING: Way(contiguous),
        "kernel alone, table in host memory": Way(bare(device, stream, rows, setting)),
        "kernel alone, table on the GPU, end seen": seen_in_host_memory(device, stream, rows, mapping.nonce, nonce),
        "prepared read": Way(reading.read, reading.prepare),
        "read": Way(reading.read, reading.renew),
    }


def measure(found: dict[str, Way], rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds of each way, after two rounds that are not counted; and its speed in units of the ceiling's."""
    times: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(rounds + 2):
        for name, way in found.items():
            way.before()
            began = time.perf_counter()
            way.run()
            if turn >= 2:
                times[name].append((time.perf_counter() - began) * 1e6)
    return {
        name: {
            "median_us": statistics.median(each),
            "lowest_us": min(each),
            "highest_us": max(each),
            "of_contiguous": statistics.median(a / b for a, b in zip(times[CEILING], each, strict=True)),
        }
        for name, each in times.items()
    }


def run(rounds: int, device: int, peer: PoolHandle, transport: Any, pool: KVPool) -> dict[str, Any]:
    """All figures."""
    details = msgspec.msgpack.decode(peer.details, type=CudaIpcDetails)
    mapping, nonce = Mapping(device, details.exported, peer.region_bytes), details.exported.nonce
    link = transport.connect(peer, soon())
    report: dict[str, Any] = {
        "machine": facts(),
        "gpu": torch.cuda.get_device_name(device),
        "without_tritons_launcher": link._copier._reads._queue.kernel.is_direct,
        "figures": {str(total): measure(ways(total, device, mapping, nonce, pool, link), rounds) for total in SIZES},
        "stages_us": {
            name: {str(total): stages(link, total, rounds, prepared=prepared) for total in SIZES}
            for name, prepared in (("prepared read", True), ("read", False))
        },
        "looks_us": looks(link),
    }
    link.close()
    mapping.close()
    return report


def show(report: dict[str, Any]) -> None:
    """The tables, the short one last."""
    console = Console(width=110)
    for name, by_size in report["stages_us"].items():
        table = Table(title=f"{name}: stages in us, medians")
        table.add_column("stage")
        for total in SIZES:
            table.add_column(f"{total >> 20} MiB", justify="right")
        for stage in next(iter(by_size.values())):
            table.add_row(stage, *(f"{by_size[str(total)][stage]:.1f}" for total in SIZES))
        console.print(table)
    looks_us = ", ".join(f"{name} {value:.2f}" for name, value in report["looks_us"].items())
    console.print(f"one look, us: {looks_us}; without Triton's launcher: {report['without_tritons_launcher']}")
    table = Table(title=f"us, and speed in units of the contiguous copy's; medians ({report['gpu']})")
    table.add_column("way")
    for total in SIZES:
        table.add_column(f"{total >> 20} MiB", justify="right")
    for name in report["figures"][str(SIZES[0])]:
        each = [report["figures"][str(total)][name] for total in SIZES]
        table.add_row(name, *(f"{one['median_us']:.0f} ({one['of_contiguous']:.2f})" for one in each))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    parser.add_argument("--rounds", type=int, default=41)
    args = parser.parse_args()
    other = 1 if driver.device_count() > 1 else 0
    command = [sys.executable, "-m", "benchmarks.gpu_kernels", "--owner", str(other)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdin is not None
    transport, endpoint, pool = side(0)
    transport.register(pool)
    peer = msgspec.msgpack.decode(base64.b64decode(process.stdout.readline()), type=PoolHandle)
    report = run(args.rounds, 0, peer, transport, pool)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    transport.close()
    endpoint.close()
    process.stdin.close()
    process.wait(30)
    show(report)


if __name__ == "__main__":
    main()
