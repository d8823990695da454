"""Scattered 32 KiB to 256 KiB blocks between two processes of one host: process_vm_readv against shared memory.

    make bench-cma

The question behind it: vLLM 0.32 lets a connector put the KV cache into a shared file (get_mem_pool_context), so that
a peer could map it and copy with memcpy. Is that worth a second mechanism? process_vm_readv reads private memory, as
vLLM allocates it; memcpy reads the same bytes in a shared file. Interleaved rounds, medians.
"""

from __future__ import annotations

import argparse
import json
import mmap
import multiprocessing as mp
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from vllm_fleet.bench.machine import facts
from vllm_fleet.core import limits
from vllm_fleet.fabric.transports.cma import read_memory

POOL_BYTES = 512 << 20


def owner(path: str, pipe: Connection) -> None:
    """Fill a private pool (as vLLM allocates one) and a shared one, tell the address, live until the pipe closes."""
    with open(path, "r+b") as file:
        shared = np.frombuffer(mmap.mmap(file.fileno(), POOL_BYTES), np.uint8)
    private = np.zeros(POOL_BYTES, np.uint8)
    private[:] = np.random.default_rng(1).integers(0, 256, POOL_BYTES, np.uint8)
    shared[:] = private
    pipe.send((os.getpid(), int(private.ctypes.data)))
    pipe.recv()


def timed(work: Callable[[], None]) -> float:
    """Seconds that ``work`` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(pid: int, address: int, shared: np.ndarray, block: int, total: int, rounds: int) -> dict[str, float]:
    """Median GB/s of each way to copy ``total`` bytes in scattered blocks of ``block`` bytes."""
    rng = np.random.default_rng(0)
    count = total // block
    sources = rng.permutation(POOL_BYTES // block)[:count].astype(np.int64) * block
    target = np.zeros(total, np.uint8)
    targets = rng.permutation(count).astype(np.int64) * block
    own = int(target.ctypes.data)
    sizes = np.full(count, block, np.int64)

    def readv() -> None:
        for start in range(0, count, limits.IOV_MAX):
            part = slice(start, start + limits.IOV_MAX)
            read_memory(pid, address + sources[part], own + targets[part], sizes[part])

    to_bytes, from_bytes = target.data, shared.data
    pairs = zip(sources.tolist(), targets.tolist(), strict=True)
    views = [(to_bytes[t : t + block], from_bytes[s : s + block]) for s, t in pairs]

    def memcpy() -> None:
        for to, start in views:
            to[:] = start

    ways = {"process_vm_readv": readv, "shared memory + memcpy": memcpy}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
        if (
            target.reshape(count, block)[targets // block].tobytes()
            != shared.reshape(-1, block)[sources // block].tobytes()
        ):
            raise SystemExit("wrong bytes")
        target[:] = 0
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(timed(way))
    return {name: total / statistics.median(times) / 1e9 for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    parser.add_argument("--rounds", type=int, default=31)
    args = parser.parse_args()
    report: dict[str, object] = {"command": "make bench-cma", "machine": facts(), "unit": "GB/s, median", "rows": []}
    table = Table(title="Scattered blocks between two processes, GB/s (medians of interleaved rounds)")
    for heading in ("block", "copied", "process_vm_readv", "shared memory + memcpy", "ratio"):
        table.add_column(heading, justify="right")
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        os.truncate(file.name, POOL_BYTES)
        ours, theirs = mp.Pipe()
        process = mp.get_context("spawn").Process(target=owner, args=(file.name, theirs), daemon=True)
        process.start()
        pid, address = ours.recv()
        shared = np.frombuffer(mmap.mmap(file.fileno(), POOL_BYTES), np.uint8)
        rows = []
        for block, total in ((32 << 10, 2 << 20), (32 << 10, 64 << 20), (64 << 10, 2 << 20), (256 << 10, 64 << 20)):
            speeds = measure(pid, address, shared, block, total, args.rounds)
            ratio = speeds["process_vm_readv"] / speeds["shared memory + memcpy"]
            rows.append({"block_bytes": block, "total_bytes": total, **speeds, "ratio": ratio})
            cells = [f"{speed:.1f}" for speed in speeds.values()]
            table.add_row(f"{block >> 10} KiB", f"{total >> 20} MiB", *cells, f"{ratio:.2f}")
        ours.send(None)
        process.join(10)
    report["rows"] = rows
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
