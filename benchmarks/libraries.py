"""Our nixl and mooncake transports against the libraries used directly, and against our cma and tcp, on CPU memory.

    python -m benchmarks.libraries --json docs/benchmarks/libraries.json

Each way has a reader process and an owner process of its own. They are stopped (SIGSTOP) while it is another's turn,
because threads of the libraries spin when they have nothing to do and would take the cores from the others. Scattered
32 KiB blocks, interleaved rounds, medians; bytes are compared once for each way before anything is measured.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from vllm_fleet.bench.machine import facts, version
from vllm_fleet.bench.raw import Bytes, RawMooncake, RawNixl, pattern
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.fabric import transports
from vllm_fleet.fabric.contract import KVPool, Region, Transport
from vllm_fleet.fabric.endpoint import Endpoint
from vllm_fleet.fabric.plan import BlockCopyPlan, Ints
from vllm_fleet.fabric.transports.nixl import NixlTransport
from vllm_fleet.net import sockets
from vllm_fleet.net.channel import Credentials
from vllm_fleet.wire.fabric import PoolHandle

POOL_BYTES = 512 << 20
BLOCK_BYTES = 32 << 10
SIZES = (32 << 20, 128 << 20, 512 << 20)
OURS = ("nixl", "nixl TLS=tcp", "mooncake", "cma", "tcp")
RAW = ("raw nixl", "raw nixl TLS=tcp", "raw mooncake")
SETTLE_S = 0.01
AGAINST = {"nixl": "raw nixl", "nixl TLS=tcp": "raw nixl TLS=tcp", "mooncake": "raw mooncake"}


class Way(Protocol):
    """One way to read scattered blocks of an owner process."""

    name: str
    pool: Bytes

    def read(self, source: Ints, target: Ints, nbytes: Ints) -> None: ...

    def close(self) -> None: ...


def make(name: str, endpoint: Endpoint) -> Transport:
    """One of OURS."""
    if name == "nixl TLS=tcp":
        return NixlTransport(endpoint, ucx={"TLS": "tcp"})
    return transports.load(name)(endpoint)


def side(name: str, memory: Bytes) -> tuple[Endpoint, Transport, PoolHandle]:
    """An endpoint on loopback that serves ``memory`` as one region of blocks."""
    endpoint = Endpoint(sockets.listen("127.0.0.1", 0, setting="bench"), Credentials("bench", bytes(32)))
    transport = make(name, endpoint)
    region = Region(int(memory.ctypes.data), memory.nbytes, BLOCK_BYTES, BLOCK_BYTES, memory.nbytes // BLOCK_BYTES)
    handle = transport.register(KVPool((region,), owner=memory))
    endpoint.start()
    return endpoint, transport, handle


class Ours:
    """A link of one of our transports to an owner process."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.pool = np.zeros(POOL_BYTES, np.uint8)
        command = [sys.executable, "-m", "benchmarks.libraries", "--owner", name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        handle = msgspec.msgpack.decode(base64.b64decode(self._process.stdout.readline()), type=PoolHandle)
        self._endpoint, self._transport, _ = side(name, self.pool)
        self._link = self._transport.connect(handle, Deadline.after(20, "bench"))

    def read(self, source: Ints, target: Ints, nbytes: Ints) -> None:
        plan = BlockCopyPlan("bench", np.zeros(len(nbytes), np.int64), source, target, nbytes)
        self._link.read(plan).wait(Deadline.after(60, "bench"))

    def close(self) -> None:
        self._transport.close()
        self._endpoint.close()
        self._process.kill()
        self._process.wait(10)


def own(name: str) -> None:
    """The owner process of Ours."""
    endpoint, transport, handle = side(name, pattern(POOL_BYTES))
    print(base64.b64encode(msgspec.msgpack.encode(handle)).decode(), flush=True)
    sys.stdin.read()
    transport.close()
    endpoint.close()


class Runner:
    """A way in a process group of its own, which runs only during its turn."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.libraries", "--run", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._hear()
        self._stop()

    def turn(self, total: int, seed: int) -> float:
        """Seconds of one read of ``total`` bytes."""
        os.killpg(self._process.pid, signal.SIGCONT)
        time.sleep(SETTLE_S)
        assert self._process.stdin is not None
        self._process.stdin.write(f"{total} {seed}\n")
        self._process.stdin.flush()
        seconds = float(self._hear())
        self._stop()
        return seconds

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)

    def _stop(self) -> None:
        os.killpg(self._process.pid, signal.SIGSTOP)

    def _hear(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: its process has ended; the reason is on standard error")
        return line


def run(name: str) -> None:
    """The reader process of a Runner: answers each line (bytes, seed) with the seconds of one read."""
    with contextlib.closing(_raw(name) if name in RAW else Ours(name)) as way:
        compare(way, pattern(POOL_BYTES))
        print("ready", flush=True)
        for line in sys.stdin:
            total, seed = map(int, line.split())
            count = total // BLOCK_BYTES
            rng = np.random.default_rng(seed)
            source, target = (rng.permutation(POOL_BYTES // BLOCK_BYTES)[:count] * BLOCK_BYTES for _ in range(2))
            nbytes = np.full(count, BLOCK_BYTES, np.int64)
            way.read(source[:32], target[:32], nbytes[:32])
            began = time.perf_counter()
            way.read(source, target, nbytes)
            print(time.perf_counter() - began, flush=True)


def measure(runners: list[Runner], total: int, rounds: int) -> list[dict[str, object]]:
    """A row for each way: medians and spread of ``rounds`` interleaved reads of ``total`` bytes."""
    seconds: dict[str, list[float]] = {runner.name: [] for runner in runners}
    for seed in range(rounds + 1):
        for runner in runners:
            seconds[runner.name].append(runner.turn(total, seed))
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    rows: list[dict[str, object]] = []
    for name, times in seconds.items():
        against = AGAINST.get(name)
        rows.append(
            {
                "way": name,
                "total_bytes": total,
                "gb_per_s": total / medians[name] / 1e9,
                "seconds": {"median": medians[name], "min": min(times[1:]), "max": max(times[1:])},
                "ratio_to_library": None if against is None else medians[against] / medians[name],
            }
        )
    return rows


def compare(way: Way, expected: Bytes) -> None:
    """SystemExit unless a read of every eighth block brings the owner's bytes."""
    source = np.arange(0, POOL_BYTES, 8 * BLOCK_BYTES, dtype=np.int64)
    target = source[::-1].copy()
    way.read(source, target, np.full(len(source), BLOCK_BYTES, np.int64))
    blocks, wanted = way.pool.reshape(-1, BLOCK_BYTES), expected.reshape(-1, BLOCK_BYTES)
    if not (blocks[target // BLOCK_BYTES] == wanted[source // BLOCK_BYTES]).all():
        raise SystemExit(f"{way.name}: wrong bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--owner", choices=OURS, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--run", choices=(*OURS, *RAW), default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.owner is not None:
        own(args.owner)
        return
    if args.run is not None:
        run(args.run)
        return
    machine = facts() | {"mooncake": version("mooncake-transfer-engine-non-cuda", "mooncake-transfer-engine")}
    rows: list[dict[str, object]] = []
    with ExitStack() as stack:
        runners = []
        for name in (*RAW, *OURS):
            runners.append(Runner(name))
            stack.callback(runners[-1].close)
        for total in SIZES:
            rows += measure(runners, total, args.rounds)
    _show(rows)
    if args.json:
        report = {
            "command": "python -m benchmarks.libraries",
            "machine": machine,
            "block_bytes": BLOCK_BYTES,
            "rounds": args.rounds,
            "rows": rows,
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def _raw(name: str) -> Way:
    if name == "raw mooncake":
        return RawMooncake(POOL_BYTES)
    return RawNixl(POOL_BYTES, {"TLS": "tcp", "NET_DEVICES": "lo"} if "tcp" in name else {"NET_DEVICES": "lo"})


def _show(rows: list[dict[str, object]]) -> None:
    table = Table(title="Scattered 32 KiB blocks between two processes (medians of interleaved rounds)")
    for heading in ("way", "MiB", "GB/s", "ratio to the library"):
        table.add_column(heading, justify="right")
    for row in rows:
        ratio, total, speed = row["ratio_to_library"], row["total_bytes"], row["gb_per_s"]
        assert isinstance(total, int)
        shown = "" if ratio is None else f"{ratio:.2f}"
        table.add_row(str(row["way"]), str(total >> 20), f"{speed:.2f}", shown)
    Console().print(table)


if __name__ == "__main__":
    main()
