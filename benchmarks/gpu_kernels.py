"""The kernels of cuda_ipc between two processes, one GPU each: scattered 32 KiB blocks against one contiguous copy.

    python -m benchmarks.gpu_kernels --json figures.json

For tuning. Each figure is the median of interleaved rounds of wall-clock time from before the run table is filled until
the copy is known to have ended; "queued" has four copies under way at a time. The last rows go through a whole link.
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
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from vllm_fleet.bench.machine import facts
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.fabric.contract import KVPool, Region
from vllm_fleet.fabric.endpoint import Endpoint
from vllm_fleet.fabric.plan import BlockCopyPlan, Ints
from vllm_fleet.fabric.transports.cuda import driver, kernels, programs
from vllm_fleet.fabric.transports.cuda.launch import Kernel
from vllm_fleet.fabric.transports.cuda.mapping import Mapping
from vllm_fleet.fabric.transports.cuda_ipc import CudaIpcDetails, CudaIpcTransport
from vllm_fleet.net import sockets
from vllm_fleet.net.channel import Credentials
from vllm_fleet.wire.fabric import PoolHandle

BLOCK = 32 << 10
POOL_BYTES = 4 << 30
REGIONS = 64
SIZES = (32 << 20, 128 << 20, 1 << 30)
SETTINGS = ((32, 8), (64, 8), (96, 8), (128, 8))
BARE = ((64, 8, 32 << 10), (64, 16, 32 << 10), (128, 4, 16 << 10), (128, 8, 16 << 10), (64, 16, 64 << 10))
Way = Callable[[], None]


def side(device: int) -> tuple[CudaIpcTransport, Endpoint, KVPool]:
    """One process's transport, with a pool of random bytes on ``device``."""
    endpoint = Endpoint(sockets.listen("127.0.0.1", 0, setting="benchmark"), Credentials("benchmark", bytes(32)))
    transport = CudaIpcTransport(endpoint)
    endpoint.allow_write = lambda grant, regions, offsets, nbytes: True
    endpoint.start()
    memory = torch.empty(POOL_BYTES, dtype=torch.uint8, device=f"cuda:{device}")
    memory.random_(0, 256)
    torch.cuda.synchronize(device)
    size = POOL_BYTES // REGIONS
    starts = range(memory.data_ptr(), memory.data_ptr() + POOL_BYTES, size)
    regions = tuple(Region(start, size, BLOCK, BLOCK, size // BLOCK) for start in starts)
    return transport, endpoint, KVPool(regions, owner=memory, cuda=device)


def owner(device: int) -> None:
    """The other process: registers, says so, stays until its input ends."""
    transport, endpoint, pool = side(device)
    print(base64.b64encode(msgspec.msgpack.encode(transport.register(pool))).decode(), flush=True)
    sys.stdin.read()
    transport.close()
    endpoint.close()


def scattered(total: int, seed: int) -> tuple[Ints, Ints]:
    """Region and offset of as many random blocks as make ``total`` bytes."""
    blocks = np.random.default_rng(seed).permutation(POOL_BYTES // BLOCK)[: total // BLOCK].astype(np.int64)
    per_region = POOL_BYTES // REGIONS // BLOCK
    return blocks // per_region, blocks % per_region * BLOCK


def bare(device: int, stream: driver.Stream, rows: Ints, setting: tuple[int, int, int], *, upload: bool = False) -> Way:
    """The kernel alone, its run table ready in pinned memory, or to be copied to the device first.

    ``setting``: programs, warps, bytes of a tile.
    """
    count, (grid, warps, tile) = len(rows), setting
    pinned = driver.Pinned(device, rows.nbytes)
    pinned.words[:] = rows.reshape(-1)
    table = driver.allocate(device, rows.nbytes) if upload else pinned.address
    kernel = Kernel(programs.copy_kernel, device, (table, count), (tile, kernels.OCTETS), warps)

    def copy() -> None:
        with driver.current(device):
            if upload:
                driver.copy_in(table, pinned.address, rows.nbytes, stream.cuda_stream)
            kernel(grid, stream.cuda_stream, (table, count))
        stream.synchronize()

    return copy


def ways(total: int, device: int, peer: PoolHandle, transport: CudaIpcTransport, pool: KVPool) -> dict[str, Way]:
    """Each way to copy ``total`` bytes, by name."""
    details = msgspec.msgpack.decode(peer.details, type=CudaIpcDetails)
    mapping = Mapping(device, details.exported, peer.region_bytes)
    stream = driver.Stream(device)
    own = np.array([region.address for region in pool.regions], np.int64)
    region, offset = scattered(total, 1)
    own_region, own_offset = scattered(total, 2)
    theirs, ours = mapping.regions[region] + offset, own[own_region] + own_offset
    nbytes = np.full(len(ours), BLOCK, np.int64)

    def contiguous() -> None:
        with driver.current(device):
            driver.copy_across(int(own[0]), int(mapping.regions[0]), total, stream.cuda_stream)
        stream.synchronize()

    def contiguous_queued() -> None:
        with driver.current(device):
            for _ in range(4):
                driver.copy_across(int(own[0]), int(mapping.regions[0]), total, stream.cuda_stream)
        stream.synchronize()

    found: dict[str, Way] = {"contiguous": contiguous, "contiguous, queued": contiguous_queued}
    for count, warps in SETTINGS:
        queue = kernels.CopyQueue(device, stream.cuda_stream, programs=count, warps=warps)
        found[f"read {count} x {warps}"] = lambda queue=queue: queue.start(theirs, ours, nbytes)()  # type: ignore[misc]
    usual = kernels.CopyQueue(device, stream.cuda_stream)
    found["read, queued"] = lambda: [usual.start(theirs, ours, nbytes) for _ in range(4)][-1]()
    found["write"] = lambda: usual.start(ours, theirs, nbytes)()
    usual.start(theirs, ours, nbytes)()
    print(f"{total >> 20} MiB: started within {start_only(usual, theirs, ours, nbytes):.0f} us")
    rows = np.stack([theirs, ours, nbytes, nbytes], axis=1)
    found["bare kernel, table uploaded"] = bare(device, stream, rows, (64, 8, BLOCK), upload=True)
    for setting in BARE:
        name = "bare kernel {} x {}, tile {} KiB".format(*setting[:2], setting[2] >> 10)
        found[name] = bare(device, stream, rows, setting)
    link = transport.connect(peer, Deadline.after(60, "benchmark"))
    plan = BlockCopyPlan("benchmark", region, offset, own_offset, nbytes)
    found["link.read"] = lambda: link.read(replace(plan)).wait(Deadline.after(60, "benchmark"))

    def link_queued() -> None:
        transfers = [link.read(replace(plan)) for _ in range(4)]
        for transfer in transfers:
            transfer.wait(Deadline.after(60, "benchmark"))

    found["link.read, queued"] = link_queued
    found["link.write"] = lambda: link.write(plan).wait(Deadline.after(60, "benchmark"))
    found["digest (own memory)"] = lambda: _digest(ours, nbytes, device, stream)
    return found


def _digest(addresses: Ints, nbytes: Ints, device: int, stream: driver.Stream) -> None:
    kernels.digest_runs(addresses, nbytes, device=device, stream=stream)


def start_only(queue: kernels.CopyQueue, sources: Ints, targets: Ints, nbytes: Ints) -> float:
    """Microseconds until a copy is started; median."""
    times = []
    for _ in range(15):
        began = time.perf_counter()
        wait = queue.start(sources, targets, nbytes)
        times.append((time.perf_counter() - began) * 1e6)
        wait()
    return statistics.median(times)


def measure(found: dict[str, Way], total: int, rounds: int) -> dict[str, dict[str, float]]:
    """GB/s of each way: median, lowest and highest of interleaved rounds, after two that are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(rounds + 2):
        for name, way in found.items():
            began = time.perf_counter()
            way()
            if turn >= 2:
                seconds[name].append((time.perf_counter() - began) / (4 if "queued" in name else 1))
    return {
        name: {
            "median": total / statistics.median(times) / 1e9,
            "lowest": total / max(times) / 1e9,
            "highest": total / min(times) / 1e9,
        }
        for name, times in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--owner", type=int, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.owner is not None:
        owner(args.owner)
        return
    other = 1 if driver.device_count() > 1 else 0
    command = [sys.executable, "-m", "benchmarks.gpu_kernels", "--owner", str(other)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdin is not None
    transport, endpoint, pool = side(0)
    transport.register(pool)
    peer = msgspec.msgpack.decode(base64.b64decode(process.stdout.readline()), type=PoolHandle)
    figures = {str(total): measure(ways(total, 0, peer, transport, pool), total, args.rounds) for total in SIZES}
    table = Table(title=f"32 KiB blocks, GPU {other} to GPU 0 ({torch.cuda.get_device_name(0)}), GB/s, medians")
    table.add_column("way")
    for total in SIZES:
        table.add_column(f"{total >> 20} MiB", justify="right")
    for name in figures[str(SIZES[0])]:
        shares = [figures[str(total)][name]["median"] for total in SIZES]
        ceilings = [figures[str(total)]["contiguous"]["median"] for total in SIZES]
        table.add_row(name, *(f"{one:.0f} ({one / of:.2f})" for one, of in zip(shares, ceilings, strict=True)))
    Console(width=100).print(table)
    if args.json:
        report = {"machine": facts(), "gpu": torch.cuda.get_device_name(0), "unit": "GB/s", "figures": figures}
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    transport.close()
    endpoint.close()
    process.stdin.close()
    process.wait(30)


if __name__ == "__main__":
    main()
