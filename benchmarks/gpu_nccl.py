"""The nccl transport between two GPUs of one host: scattered 32 KiB blocks, against contiguous copies in the same run.

    python -m benchmarks.gpu_nccl [--out PATH] [--rounds N] [--only bare|reads|stages]

``bare`` sweeps what a link may do with its streams (benchmarks/gpu_nccl_bare.py): size and number of staging buffers,
communicators, CTAs, registered staging, grouped calls, gather and scatter kernels; without the conversation. ``reads``
are whole reads through the transport with some settings, from Link.read() to the end of wait(): question, gather, wire,
scatter and the owner's confirmation; also with plans prepared (Link.prepare) before. Each with the contiguous peer
copy, in interleaved rounds; medians. ``stages`` shows where the time of a read goes (benchmarks/gpu_nccl_stages.py).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from benchmarks.gpu_nccl_bare import BLOCK, MIB, NO_COPY, Side, Way, described, full_ways, wire_ways
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.fabric.contract import KVPool, Link, Region
from vllm_fleet.fabric.endpoint import Endpoint
from vllm_fleet.fabric.plan import BlockCopyPlan, BlockShape, plan_blocks
from vllm_fleet.fabric.rendezvous import Meeting
from vllm_fleet.fabric.transports.cuda.nccl_tuning import Tuning
from vllm_fleet.fabric.transports.nccl import NcclTransport
from vllm_fleet.net import sockets
from vllm_fleet.net.channel import Credentials
from vllm_fleet.wire.fabric import PoolHandle

POOL = 6 << 30
BARE_SIZES = (128 * MIB, 1024 * MIB)
READ_SIZES = (32 * MIB, 128 * MIB, 1024 * MIB, 4096 * MIB)
TUNINGS = (
    Tuning(15 * MIB, 4, 16, 2, programs=32),
    Tuning(15 * MIB, 4, 16, 3, programs=32),
    Tuning(15 * MIB, 4, 16, 3, programs=64),
    Tuning(15 * MIB, 4, 32, 3, programs=64),
    Tuning(20 * MIB, 3, 32, 2, programs=32),
)
PREPARED = ", prepared"
WARM = 2
BEST = 8
SECRET = Credentials("bench", bytes(32))


class Given:
    """A Rendezvous by hand: the id came through a pipe."""

    def __init__(self, rank: int, pipe: Connection) -> None:
        self._rank, self._pipe = rank, pipe

    def meet(self, create: Callable[[], bytes], deadline: Deadline) -> Meeting:
        if self._rank == 0:
            group_id = create()
            self._pipe.send_bytes(group_id)
        else:
            group_id = self._pipe.recv_bytes()
        return Meeting(self._rank, 2, 1, group_id)

    def joined(self, meeting: Meeting) -> bool:
        return True


def make_pool(device: int) -> tuple[KVPool, Any]:
    """POOL bytes on a GPU, in blocks of BLOCK."""
    tensor: Any = torch.randint(0, 256, (POOL,), dtype=torch.uint8, device=torch.device("cuda", device))
    torch.cuda.synchronize(device)
    return KVPool((Region(tensor.data_ptr(), POOL, BLOCK, BLOCK, POOL // BLOCK),), owner=tensor, cuda=device), tensor


def serve(tuning: Tuning) -> tuple[Endpoint, NcclTransport]:
    endpoint = Endpoint(sockets.listen("127.0.0.1", 0, setting="bench"), SECRET)
    return endpoint, NcclTransport(endpoint, tuning)


def owner(pipe: Connection, bare: bool) -> None:
    """GPU 1: serve a pool; then send what each message on the pipe names, (way, bytes), and answer the host's time.

    The owner's own settings (programs, registered, uploaded) are those of a transport for each of TUNINGS.
    """
    torch.cuda.set_device(1)
    pool, tensor = make_pool(1)
    served = [serve(tuning) for tuning in TUNINGS]
    handles = [transport.register(pool) for _, transport in served]
    pipe.send_bytes(msgspec.msgpack.encode(handles))
    for endpoint, _ in served:
        endpoint.start()
    if bare:
        side = Side(Given(1, pipe), 1, tensor.data_ptr(), POOL)
        ways = [*wire_ways(), *full_ways()]
        for way in ways:
            for nbytes in BARE_SIZES:
                side.prepare(way, nbytes, sending=True)
        pipe.send_bytes(b"ready")
        while (asked := msgspec.msgpack.decode(pipe.recv_bytes(), type=tuple[int, int])) != (0, 0):
            spent = side.move(ways[asked[0]], asked[1], sending=True)
            pipe.send_bytes(msgspec.msgpack.encode(spent))
        side.close()
    pipe.recv_bytes()  # the end
    for endpoint, transport in served:
        transport.close()
        endpoint.close()


class Bench:
    """GPU 0's side."""

    def __init__(self, pipe: Connection) -> None:
        torch.cuda.set_device(0)
        self.pipe = pipe
        self.peers = msgspec.msgpack.decode(pipe.recv_bytes(), type=list[PoolHandle])
        self.pool, self.tensor = make_pool(0)
        self.far: Any = torch.zeros(READ_SIZES[-1], dtype=torch.uint8, device="cuda:1")
        torch.cuda.synchronize(1)
        self.stream = torch.cuda.Stream(0)

    def copy(self, nbytes: int) -> float:
        """Seconds of a contiguous copy from GPU 1's memory, in this process."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        with torch.cuda.stream(self.stream):
            self.stream.synchronize()
            events[0].record()
            self.tensor[:nbytes].copy_(self.far[:nbytes], non_blocking=True)
            events[1].record()
            events[1].synchronize()
        return float(events[0].elapsed_time(events[1])) / 1000


def gbps(nbytes: int, seconds: list[float]) -> float:
    return round(nbytes / statistics.median(seconds) / 1e9, 1)


def sweep(bench: Bench, rounds: int) -> dict[str, Any]:
    """All ways of gpu_nccl_bare."""
    side = Side(Given(0, bench.pipe), 0, bench.tensor.data_ptr(), POOL)
    ways = [*wire_ways(), *full_ways()]
    for way in ways:
        for nbytes in BARE_SIZES:
            side.prepare(way, nbytes, sending=False)
    assert bench.pipe.recv_bytes() == b"ready"
    sizes: dict[str, Any] = {}
    for nbytes in BARE_SIZES:
        took: list[list[float]] = [[] for _ in ways]
        host: list[list[float]] = [[] for _ in ways]
        copies: list[float] = []
        for turn in range(rounds + WARM):
            for index, way in enumerate(ways):
                bench.pipe.send_bytes(msgspec.msgpack.encode((index, nbytes)))
                own = side.move(way, nbytes, sending=False)
                spent = side.wait()
                theirs = msgspec.msgpack.decode(bench.pipe.recv_bytes(), type=float)
                if turn >= WARM:
                    took[index].append(spent)
                    host[index].append(max(own, theirs) / len(way.sizes(nbytes)))
                if index % 20 == 0 and turn >= WARM:
                    copies.append(bench.copy(nbytes))
        peer = gbps(nbytes, copies)
        rows = [
            described(way) | {"name": str(way), "GB/s": speed, "share": round(speed / peer, 3), "host us/message": busy}
            for way, speed, busy in zip(
                ways,
                [gbps(nbytes, one) for one in took],
                [round(statistics.median(one) * 1e6, 1) for one in host],
                strict=True,
            )
        ]
        alone = {
            f"{copy} {grid}": gbps(nbytes, [side.gather_alone(way, nbytes) for _ in range(rounds)])
            for copy in ("pinned", "uploaded")
            for grid in (32, 64, 96)
            for way in [Way(15, 4, 2, 16, copy=copy, programs=grid)]
        }
        sizes[str(nbytes // MIB)] = {"peer copy": peer, "scatter alone": alone, "ways": rows}
    bench.pipe.send_bytes(msgspec.msgpack.encode((0, 0)))
    side.close()
    return sizes


def reads(bench: Bench, rounds: int) -> list[dict[str, Any]]:
    """Whole reads through the transport, one link for each of TUNINGS; one row for each size."""
    served = [serve(tuning) for tuning in TUNINGS]
    links: dict[str, Link] = {}
    for (endpoint, transport), tuning, peer in zip(served, TUNINGS, bench.peers, strict=True):
        transport.register(bench.pool)
        endpoint.start()
        links[named(tuning)] = transport.connect(peer, Deadline.after(60, "bench"))
    ways = [(name, prepared) for name in links for prepared in (False, True)]
    rows = []
    for nbytes in READ_SIZES:
        plan = scattered(nbytes)
        took: dict[str, list[float]] = {name + PREPARED * prepared: [] for name, prepared in ways}
        copies = []
        for turn in range(rounds + WARM):
            copies.append(bench.copy(nbytes))
            for name, prepared in ways:
                if prepared:
                    links[name].prepare(plan)
                began = time.perf_counter()
                links[name].read(plan).wait(Deadline.after(30, "bench"))
                if turn >= WARM:
                    took[name + PREPARED * prepared].append(time.perf_counter() - began)
        rows.append(
            {"mib": nbytes // MIB, "peer copy": gbps(nbytes, copies[WARM:])}
            | {name: gbps(nbytes, spent) for name, spent in took.items()}
            | {"best": {name: gbps(nbytes, [min(spent)]) for name, spent in took.items()}}
        )
    for endpoint, transport in served:
        transport.close()
        endpoint.close()
    return rows


def named(tuning: Tuning) -> str:
    more = "registered" * tuning.registered + "uploaded" * tuning.uploaded
    return (
        f"{tuning.chunk_bytes // MIB} MiB x {tuning.buffers}, {tuning.lanes} x {tuning.ctas_max} CTAs, "
        f"{tuning.programs} programs {more}".rstrip()
    )


def scattered(nbytes: int) -> BlockCopyPlan:
    rng = np.random.default_rng(nbytes)
    sources, targets = (rng.permutation(POOL // BLOCK)[: nbytes // BLOCK] for _ in range(2))
    return plan_blocks([BlockShape(BLOCK, BLOCK, POOL // BLOCK)], sources, targets, "bench")  # type: ignore[arg-type]


def print_sweep(sizes: dict[str, Any]) -> None:
    for mib, found in sizes.items():
        print(f"\nbare, {mib} MiB: peer copy {found['peer copy']} GB/s; scatter alone {found['scatter alone']}")
        for title, copied in (("messages alone", False), ("with gather and scatter", True)):
            rows = [row for row in found["ways"] if (row["copy"] != NO_COPY) == copied]
            print(f"  {title}: best {BEST} of {len(rows)}")
            for row in sorted(rows, key=lambda row: -float(row["share"]))[:BEST]:
                speed, busy = row["GB/s"], row["host us/message"]
                print(f"    {row['share']:5.2f} {speed:7} GB/s {busy:6} us/message  {row['name']}")


def print_reads(rows: list[dict[str, Any]]) -> None:
    print("\nreads, GB/s (share of the peer copy):", *(f"{row['mib']} MiB" for row in rows))
    for name in rows[0]:
        if name not in ("best", "mib"):
            print(f"  {name:60}", *(f"{row[name]:7} ({row[name] / row['peer copy']:.2f})" for row in rows))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", "--json", type=Path, help="where to write everything as JSON")
    arguments.add_argument("--rounds", type=int, default=5, help="rounds of the sweep; reads take three times as many")
    arguments.add_argument("--only", choices=("bare", "reads", "stages"))
    chosen = arguments.parse_args()
    wanted = (chosen.only,) if chosen.only else ("bare", "reads", "stages")
    began = time.monotonic()
    result: dict[str, Any] = {"gpu": torch.cuda.get_device_name(0), "torch": torch.__version__}
    result |= {"nccl": torch.cuda.nccl.version(), "cores": os.cpu_count(), "python": platform.python_version()}
    result |= {"kernel": platform.release().partition("-")[0], "date": time.strftime("%Y-%m-%d")}
    result |= {"command": " ".join(["python -m benchmarks.gpu_nccl", *sys.argv[1:]]), "rounds": chosen.rounds}
    if wanted != ("stages",):
        result |= measure(wanted, chosen.rounds)
    if "stages" in wanted:  # last: it wraps what the others use
        from benchmarks.gpu_nccl_stages import profile, show

        result["stages"] = profile(3 * chosen.rounds, Tuning())
        show(result["stages"])
    result["seconds"] = round(time.monotonic() - began, 1)
    if chosen.out:
        chosen.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['seconds']} s")


def measure(wanted: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """What ``wanted`` names of bare and reads; prints it, too."""
    result: dict[str, Any] = {}
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=owner, args=(theirs, "bare" in wanted), daemon=True)
    process.start()
    bench = Bench(ours)
    if "bare" in wanted:
        result["bare"] = sweep(bench, rounds)
        print_sweep(result["bare"])
    if "reads" in wanted:
        result["reads"] = reads(bench, 3 * rounds)
        print_reads(result["reads"])
    bench.pipe.send_bytes(b"end")
    process.join(30)
    return result


if __name__ == "__main__":
    main()
