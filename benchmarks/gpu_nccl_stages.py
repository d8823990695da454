"""Where the time of one nccl read goes: stamps on both sides, which share a clock, from read() to the end of wait().

The calls that end a stage are wrapped here, in the two processes of this benchmark only: the transport itself knows
nothing of it. A stamp costs 0.3 us. Stages that happen once for each piece show their first and their last time.
"""

from __future__ import annotations

import functools
import multiprocessing as mp
import socket
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import torch

from benchmarks.gpu_nccl import make_pool, named, scattered, serve
from benchmarks.gpu_nccl_bare import MIB
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.fabric.owner import OwnedPool
from vllm_fleet.fabric.transports.cuda import nccl_owner, nccl_questions
from vllm_fleet.fabric.transports.cuda.communicator import Communicator
from vllm_fleet.fabric.transports.cuda.launch import Kernel
from vllm_fleet.fabric.transports.cuda.nccl_tuning import Tuning
from vllm_fleet.fabric.transports.cuda.pipe import Pipe
from vllm_fleet.net.channel import Channel
from vllm_fleet.wire import fabric as wire
from vllm_fleet.wire.fabric import PoolHandle

SIZES = (32 * MIB, 128 * MIB, 1024 * MIB)
WARM = 3
Stamp = tuple[str, float]


class Stamps:
    """What happened in this process, and when (time.monotonic())."""

    def __init__(self) -> None:
        self.taken: list[Stamp] = []

    def take(self, name: str) -> None:
        self.taken.append((name, time.monotonic()))

    def fresh(self) -> list[Stamp]:
        """All since the last call."""
        taken, self.taken = self.taken, []
        return taken

    def after(self, holder: Any, attribute: str, name: str) -> None:
        """Stamp whenever a function of a module or class has returned."""
        call: Callable[..., Any] = getattr(holder, attribute)

        @functools.wraps(call)
        def stamped(*arguments: Any, **options: Any) -> Any:
            result = call(*arguments, **options)
            self.taken.append((name, time.monotonic()))
            return result

        setattr(holder, attribute, stamped)

    def each(self, holder: Any, attribute: str, name: str) -> None:
        """Stamp whenever an iterator that a function returns has come to its next element."""
        call: Callable[..., Iterator[Any]] = getattr(holder, attribute)

        def stamped(*arguments: Any) -> Iterator[Any]:
            for element in call(*arguments):
                self.taken.append((name, time.monotonic()))
                yield element

        setattr(holder, attribute, stamped)

    def common(self) -> None:
        """Stages of both sides; before any link is made."""
        self.after(Pipe, "drain", "end seen on the GPU")
        self.after(Kernel, "__call__", "copy kernel launched")
        self.after(Communicator, "send", "send enqueued")
        self.after(Communicator, "receive", "recv enqueued")
        self.after(Channel, "send", "message sent")

    def owners(self) -> None:
        receive = socket.socket.recv

        def woken(held: socket.socket, *arguments: Any) -> bytes:
            content: bytes = receive(held, *arguments)
            if arguments == (1,):  # Channel.receive_idle
                self.take("woke")
            return content

        setattr(socket.socket, "recv", woken)  # noqa: B010 - mypy refuses the plain assignment
        self.after(Channel, "receive_exactly", "message received")
        self.after(wire, "decode_question", "question decoded")
        self.after(OwnedPool, "check", "checked")
        self.each(nccl_owner, "lead_and_rest", "pieces cut")

    def readers(self) -> None:
        self.after(nccl_questions.Questions, "ask", "question made")
        self.after(nccl_questions.Questions, "pieces", "pieces cut")
        self.after(nccl_questions, "receive_answer", "answer received")


def owner(pipe: Connection, tuning: Tuning) -> None:
    """GPU 1: serve a pool, and tell its stamps whenever it is asked."""
    torch.cuda.set_device(1)
    stamps = Stamps()
    stamps.common()
    stamps.owners()
    pool, _ = make_pool(1)
    endpoint, transport = serve(tuning)
    pipe.send_bytes(msgspec.msgpack.encode(transport.register(pool)))
    endpoint.start()
    while pipe.recv_bytes() != b"end":
        pipe.send_bytes(msgspec.msgpack.encode(stamps.fresh()))
    transport.close()
    endpoint.close()


def profile(rounds: int, tuning: Tuning) -> dict[str, Any]:
    """Medians, in microseconds after read(): for each size, plain and prepared, rows of (stage, times, first, last)."""
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=owner, args=(theirs, tuning), daemon=True)
    process.start()
    torch.cuda.set_device(0)
    stamps = Stamps()
    stamps.common()
    stamps.readers()
    pool, _ = make_pool(0)
    endpoint, transport = serve(tuning)
    transport.register(pool)
    endpoint.start()
    peer = msgspec.msgpack.decode(ours.recv_bytes(), type=PoolHandle)
    link = transport.connect(peer, Deadline.after(60, "bench"))
    found: dict[str, Any] = {"tuning": named(tuning), "rounds": rounds, "traces": {}}
    for nbytes in SIZES:
        for prepared in (False, True):
            plan = scattered(nbytes)
            taken: list[list[Stamp]] = []
            for turn in range(rounds + WARM):
                if prepared:
                    link.prepare(plan)
                ours.send_bytes(b"stamps")
                ours.recv_bytes()
                time.sleep(0.002)  # the owner's thread sleeps, as between requests
                stamps.fresh()
                began = time.monotonic()
                transfer = link.read(plan)
                stamps.take("read() returned")
                transfer.wait(Deadline.after(30, "bench"))
                stamps.take("wait() returned")
                own = stamps.fresh()
                ours.send_bytes(b"stamps")
                other = msgspec.msgpack.decode(ours.recv_bytes(), type=list[Stamp])
                if turn >= WARM:
                    both = [(f"reader  {name}", at) for name, at in own]
                    both += [(f"owner   {name}", at) for name, at in other]
                    taken.append([(name, (at - began) * 1e6) for name, at in both])
            title = f"{nbytes // MIB} MiB{', prepared' if prepared else ''}"
            found[title] = medians(taken)
            typical = sorted(taken, key=lambda stamps: dict(stamps)["reader  wait() returned"])[len(taken) // 2]
            found["traces"][title] = [(name, round(at, 1)) for name, at in sorted(typical, key=lambda stamp: stamp[1])]
    ours.send_bytes(b"end")
    process.join(30)
    transport.close()
    endpoint.close()
    return found


def medians(taken: list[list[Stamp]]) -> list[dict[str, Any]]:
    """One row for each stage, in the order of their first times."""
    seen: dict[str, list[list[float]]] = defaultdict(list)
    for stamps in taken:
        times: dict[str, list[float]] = defaultdict(list)
        for name, at in stamps:
            times[name].append(at)
        for name, all_at in times.items():
            seen[name].append(all_at)
    rows = [
        {
            "stage": name,
            "times": statistics.median_low([len(one) for one in all_at]),
            "first us": round(statistics.median(one[0] for one in all_at), 1),
            "last us": round(statistics.median(one[-1] for one in all_at), 1),
        }
        for name, all_at in seen.items()
    ]
    return sorted(rows, key=lambda row: float(row["first us"]))


def show(found: dict[str, Any]) -> None:
    print(f"\nstages of a read, {found['tuning']}: medians of {found['rounds']}, us after read() was called")
    for title, rows in found.items():
        if isinstance(rows, list):
            print(f"  {title}{'':24}times   first    last")
            for row in rows:
                print(f"    {row['stage']:30} {row['times']:6} {row['first us']:7} {row['last us']:7}")
