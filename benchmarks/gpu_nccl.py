"""The nccl transport between two GPUs of one host: scattered 32 KiB blocks, against contiguous copies in the same run.

    python -m benchmarks.gpu_nccl [--json PATH] [--rounds N]

Columns: contiguous peer copy (the ceiling), contiguous ncclSend/ncclRecv of one buffer, and reads of scattered blocks
through the transport for some sizes of staging, from Link.read() to the end of wait(): the question over the control
connection, gather, wire, scatter and the owner's confirmation are all in it. Interleaved rounds, medians.
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

from vllm_fleet.core.deadline import Deadline
from vllm_fleet.fabric.contract import KVPool, Region
from vllm_fleet.fabric.endpoint import Endpoint
from vllm_fleet.fabric.plan import BlockCopyPlan, BlockShape, plan_blocks
from vllm_fleet.fabric.rendezvous import Meeting
from vllm_fleet.fabric.transports.cuda.communicator import Communicator, Tuning
from vllm_fleet.fabric.transports.cuda.pipe import PROGRAMS
from vllm_fleet.fabric.transports.nccl import NcclTransport
from vllm_fleet.net import sockets
from vllm_fleet.net.channel import Credentials
from vllm_fleet.wire.fabric import PoolHandle

BLOCK = 32 << 10
POOL = 6 << 30
MIB = 1 << 20
SIZES = (32 * MIB, 128 * MIB, 1024 * MIB, 4096 * MIB)
TUNINGS = (
    Tuning(31 * MIB, 2, 32, lanes=1),
    Tuning(15 * MIB, 4, 32, lanes=1),
    Tuning(15 * MIB, 4, 12, lanes=2),
    Tuning(15 * MIB, 4, 16, lanes=2),
    Tuning(15 * MIB, 4, 32, lanes=2),
    Tuning(10 * MIB, 6, 16, lanes=2),
    Tuning(10 * MIB, 6, 12, lanes=3),
    Tuning(10 * MIB, 6, 16, lanes=3),
)
RAW = Tuning(ctas_max=32, lanes=1)
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


def owner(pipe: Connection) -> None:
    """GPU 1: serve a pool; then, for each size on the pipe, send that many bytes through a communicator of its own."""
    torch.cuda.set_device(1)
    endpoint, transport = serve(Tuning(10 * MIB, 6))
    pool, tensor = make_pool(1)
    pipe.send_bytes(msgspec.msgpack.encode(transport.register(pool)))
    endpoint.start()
    raw = Communicator(Given(1, pipe), 1, RAW, lambda: None, Deadline.after(60, "bench"))
    stream = torch.cuda.Stream(1)
    connect(raw, tensor, stream)
    while nbytes := int.from_bytes(pipe.recv_bytes()):
        raw.send(tensor.data_ptr(), nbytes, stream.cuda_stream)
        stream.synchronize()
    transport.close()
    endpoint.close()


def connect(raw: Communicator, tensor: Any, stream: Any) -> None:
    """Both sides' first message."""
    raw.exchange(
        tensor.data_ptr(), tensor.data_ptr() + MIB, MIB, stream.cuda_stream, lambda: None, Deadline.after(60, "bench")
    )
    stream.synchronize()


def seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


class Bench:
    """GPU 0's side."""

    def __init__(self, pipe: Connection) -> None:
        torch.cuda.set_device(0)
        self.pipe = pipe
        self.peer = msgspec.msgpack.decode(pipe.recv_bytes(), type=PoolHandle)
        self.raw = Communicator(Given(0, pipe), 0, RAW, lambda: None, Deadline.after(60, "bench"))
        self.stream = torch.cuda.Stream(0)
        self.pool, self.tensor = make_pool(0)
        connect(self.raw, self.tensor, self.stream)
        self.far: Any = torch.zeros(SIZES[-1], dtype=torch.uint8, device="cuda:1")
        torch.cuda.synchronize(1)
        self.served = [serve(tuning) for tuning in TUNINGS]
        self.links = []
        for _, transport in self.served:
            transport.register(self.pool)
            self.links.append(transport.connect(self.peer, Deadline.after(60, "bench")))

    def copy(self, nbytes: int) -> float:
        """Contiguous copy from GPU 1's memory, in this process."""
        return self._between(lambda: self.tensor[:nbytes].copy_(self.far[:nbytes], non_blocking=True))

    def receive(self, nbytes: int) -> float:
        """Contiguous ncclSend/ncclRecv of one buffer; both sides' calls are in it, the pipe's message too."""

        def both() -> None:
            self.pipe.send_bytes(nbytes.to_bytes(8))
            self.raw.receive(self.tensor.data_ptr(), nbytes, self.stream.cuda_stream)

        return self._between(both)

    def _between(self, work: Callable[[], Any]) -> float:
        """Seconds between two events around what ``work`` enqueues."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        with torch.cuda.stream(self.stream):
            self.stream.synchronize()
            events[0].record()
            work()
            events[1].record()
            events[1].synchronize()
        return float(events[0].elapsed_time(events[1])) / 1000

    def read(self, link: int, nbytes: int) -> float:
        """One scattered read through a link."""
        plan = scattered(nbytes)
        return seconds(lambda: self.links[link].read(plan).wait(Deadline.after(30, "bench")))

    def close(self) -> None:
        self.pipe.send_bytes(b"")
        for endpoint, transport in self.served:
            transport.close()
            endpoint.close()
        self.raw.abort()


def scattered(nbytes: int) -> BlockCopyPlan:
    rng = np.random.default_rng(nbytes)
    sources, targets = (rng.permutation(POOL // BLOCK)[: nbytes // BLOCK] for _ in range(2))
    return plan_blocks([BlockShape(BLOCK, BLOCK, POOL // BLOCK)], sources, targets, "bench")  # type: ignore[arg-type]


def measure(bench: Bench, rounds: int) -> list[dict[str, Any]]:
    """One row for each size: GB/s, medians of interleaved rounds."""
    ways: dict[str, Callable[[int], float]] = {"peer copy": bench.copy, "ncclRecv": bench.receive}
    for index, tuning in enumerate(TUNINGS):
        name = f"{tuning.chunk_bytes // MIB} MiB x {tuning.buffers}, {tuning.lanes} x {tuning.ctas_max} CTAs"
        ways[name] = lambda nbytes, index=index: bench.read(index, nbytes)  # type: ignore[misc]
    rows = []
    for nbytes in SIZES:
        took: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(rounds + 3):
            for name, way in ways.items():
                spent = way(nbytes)
                if turn >= 3:
                    took[name].append(spent)
        rows.append(
            {"mib": nbytes // MIB}
            | {name: round(nbytes / statistics.median(spent) / 1e9, 1) for name, spent in took.items()}
            | {"best": {name: round(nbytes / min(spent) / 1e9, 1) for name, spent in took.items()}}
        )
    return rows


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--json", type=Path)
    arguments.add_argument("--rounds", type=int, default=15)
    chosen = arguments.parse_args()
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=owner, args=(theirs,), daemon=True)
    process.start()
    bench = Bench(ours)
    rows = measure(bench, chosen.rounds)
    bench.close()
    process.join(30)
    for name in rows[0]:
        if name != "best":
            print(f"{name:28}", *(f"{row[name]:8}" for row in rows))
    share = {row["mib"]: round(max(v for k, v in row.items() if "CTAs" in k) / row["peer copy"], 3) for row in rows}
    print("share of the peer copy, best variant of each size:", share)
    if chosen.json:
        multiprocessors = {"nccl": "at most the CTAs named", "copy kernel": PROGRAMS}
        result = {"gpu": torch.cuda.get_device_name(0), "torch": torch.__version__, "rows": rows}
        result["share, best variant of each size"] = share
        result |= {"nccl": torch.cuda.nccl.version(), "cores": os.cpu_count(), "python": platform.python_version()}
        result |= {"kernel": platform.release().partition("-")[0], "date": time.strftime("%Y-%m-%d")}
        result |= {"command": " ".join(["python -m benchmarks.gpu_nccl", *sys.argv[1:]]), "rounds": chosen.rounds}
        chosen.json.write_text(json.dumps(result | {"multiprocessors": multiprocessors}, indent=1) + "\n")


if __name__ == "__main__":
    main()
