"""`vllm-fleet bench fabric`: ways to move scattered blocks of KV, side by side in one run, round after round."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import psutil
from rich.table import Table

from vllm_fleet.bench import machine
from vllm_fleet.bench.arena import Arena
from vllm_fleet.bench.blocks import BLOCK_BYTES, REGIONS, scattered
from vllm_fleet.bench.contenders import (
    Case,
    Contender,
    Gather,
    Memcpy,
    OurTransport,
    PreparedReads,
    RawLibrary,
    RawStream,
)
from vllm_fleet.core.errors import FleetError
from vllm_fleet.fabric.integrity import Mode

PAIRS = (
    ("cma", "memcpy in one process"),
    ("tcp", "raw TCP stream"),
    ("tcp", "nixl-tcp used directly"),
    ("tcp", "mooncake used directly"),
    ("nixl", "nixl used directly"),
    ("mooncake", "mooncake used directly"),
    ("cuda_ipc", "contiguous peer copy"),
    ("cuda_ipc, prepared", "contiguous peer copy"),
    ("nccl", "contiguous peer copy"),
    ("cma, sampled checksums", "cma"),
    ("tcp, sampled checksums", "tcp"),
    ("cuda_ipc, sampled checksums", "cuda_ipc"),
)
"""What is compared with what: each ratio is the median of the ratios of single rounds, taken moments apart."""

CEILINGS = {"cma": "memcpy in one process", "memory": "memcpy in one process", "tcp": "raw TCP stream"}
CUDA_CEILING = "contiguous peer copy"
PREPARING = ("cuda_ipc", "nccl")
"""Transports whose Link.prepare() does something: they are run without it and with it."""
NOT_A_NUMBER = float("nan")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """What to run."""

    transports: tuple[str, ...]
    against: tuple[str, ...]
    sizes: tuple[int, ...]
    rounds: int
    checksums: tuple[Mode, ...] = ()
    """Modes that each transport is run with besides off."""
    cuda: tuple[int, int] | None = None
    """This side's and the owner's CUDA device; None: CPU memory."""
    seconds: float = 60.0
    """Rounds of one size stop after this long, but not before the third."""


@dataclass
class Row:
    """One contender at one size."""

    contender: str
    kind: str
    nbytes: int
    sms: int
    seconds: list[float] = field(default_factory=list)
    cpu_s: float = 0.0

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def p99(self) -> float:
        """Seconds; the slowest of fewer than a hundred rounds."""
        return sorted(self.seconds)[min(len(self.seconds) - 1, math.ceil(0.99 * len(self.seconds)) - 1)]

    @property
    def gb_s(self) -> float:
        """1e9 bytes a second, of the median."""
        return self.nbytes / self.median / 1e9

    @property
    def cpu_s_per_gb(self) -> float:
        """CPU seconds of both sides for 1e9 bytes; nan when one side's are not known."""
        return self.cpu_s / (self.nbytes * len(self.seconds) / 1e9)


def sizes_that_fit(sizes: Sequence[int], cuda: bool, libraries: int) -> tuple[tuple[int, ...], int]:
    """The sizes that fit into this machine's memory, and how much of it is free."""
    free = psutil.virtual_memory().available
    if cuda:
        return tuple(sizes), free
    pools = 4 + 2 * libraries  # owner, reader, memcpy's two; each library's two
    return tuple(size for size in sizes if size * pools <= free * 0.9), free


def run(wanted: Wanted, say: Say) -> dict[str, Any]:
    """Run it; everything that was measured, ready for JSON. Raises FleetError when nothing can be run."""
    names = tuple(dict.fromkeys(wanted.transports))
    total = max(wanted.sizes)
    say(f"filling {total >> 20} MiB of blocks on both sides")
    began = machine.facts()
    arena = Arena(names, total, wanted.cuda)
    contenders: list[Contender] = []
    refused = dict(arena.refused)
    try:
        contenders = _contenders(arena, wanted, refused, say)
        rows = [row for size in wanted.sizes for row in _measure(contenders, size, total, wanted, say)]
        checks = {c.name: part for c in contenders if (part := c.checks()) is not None}
    finally:
        for contender in contenders:
            contender.close()
        arena.close()
    return {
        "machine": began,
        "block_bytes": BLOCK_BYTES,
        "regions": REGIONS,
        "memory": "cpu" if wanted.cuda is None else f"cuda {wanted.cuda[0]} <- {wanted.cuda[1]}",
        "not_run": refused,
        "rows": [_plain(row, rows) for row in rows],
        "checks": checks,
        "ratios": ratios(rows),
    }


def _contenders(arena: Arena, wanted: Wanted, refused: dict[str, str], say: Say) -> list[Contender]:
    made: list[Contender] = []

    def add(name: str, make: Callable[[], Contender]) -> None:
        say(f"connecting {name}")
        try:
            made.append(make())
        except FleetError as error:
            refused[name] = str(error)

    for name in wanted.transports:
        if name in refused:
            continue
        add(name, partial(OurTransport, arena, name))
        if name in PREPARING:
            add(f"{name} prepared", partial(PreparedReads, arena, name))
        for mode in wanted.checksums:
            add(f"{name} {mode}", partial(OurTransport, arena, name, mode))
    if wanted.cuda is None:
        memcpy = Memcpy(arena.nbytes)
        made += [memcpy, Gather(memcpy)]
        add("raw stream", partial(RawStream, arena))
    else:
        from vllm_fleet.bench.contenders_cuda import PeerCopy

        add("peer copy", partial(PeerCopy, arena.nbytes, wanted.cuda))
    for name in wanted.against:
        add(name, partial(RawLibrary, name, arena.nbytes))
    return made


def _measure(contenders: Sequence[Contender], size: int, total: int, wanted: Wanted, say: Say) -> list[Row]:
    case = Case(size, total, seed=size)
    source, target = scattered(*case)
    fitting = [contender for contender in contenders if size <= contender.bytes_max]
    nbytes = len(source) * REGIONS * BLOCK_BYTES
    rows = {c.name: Row(c.name, c.kind, nbytes, c.sms) for c in fitting}
    for contender in fitting:
        say(f"{nbytes >> 20} MiB: preparing {contender.name}")
        contender.prepare(source, target, case)
    began, order = time.monotonic(), random.Random(size)
    for number in range(wanted.rounds):
        if number >= 3 and time.monotonic() - began > wanted.seconds:
            break
        say(f"{nbytes >> 20} MiB: round {number + 1} of {wanted.rounds}")
        for contender in order.sample(fitting, len(fitting)):
            cpu = contender.cpu_s()
            rows[contender.name].seconds.append(contender.copy())
            rows[contender.name].cpu_s += contender.cpu_s() - cpu
    return list(rows.values())


def ratios(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Speed of the first of each pair in units of the second's, at each size: medians over rounds."""
    found: list[dict[str, Any]] = []
    by_name = {(row.contender, row.nbytes): row for row in rows}
    for size in dict.fromkeys(row.nbytes for row in rows):
        for ours, other in PAIRS:
            one, two = by_name.get((ours, size)), by_name.get((other, size))
            if one is not None and two is not None:
                each = [b / a for a, b in zip(one.seconds, two.seconds, strict=True)]
                found.append({"of": ours, "to": other, "nbytes": size, "ratio": statistics.median(each)})
    return found


def _plain(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "contender": row.contender,
        "kind": row.kind,
        "nbytes": row.nbytes,
        "median_s": row.median,
        "p99_s": row.p99,
        "gb_s": row.gb_s,
        "of_ceiling": share(row, rows),
        "cpu_s_per_gb": None if math.isnan(row.cpu_s_per_gb) else row.cpu_s_per_gb,
        "sms": row.sms,
        "seconds": row.seconds,
    }


def share(row: Row, rows: Sequence[Row]) -> float | None:
    """Part of the ceiling measured in the same run; None where there is none to compare with."""
    name = CEILINGS.get(row.contender.partition(",")[0], CUDA_CEILING)
    ceiling = next((other for other in rows if other.contender == name and other.nbytes == row.nbytes), None)
    return None if ceiling is None or ceiling is row else row.gb_s / ceiling.gb_s


def table(report: dict[str, Any]) -> Table:
    """The rows, as a person reads them."""
    shown = Table(
        title=f"Scattered {BLOCK_BYTES >> 10} KiB blocks between two processes, {report['memory']} memory",
        caption="medians; of top: of the ceiling measured in the same run",
        padding=(0, 1, 0, 0),
    )
    for heading in ("MiB", "contender", "ms", "p99 ms", "GB/s", "of top", "CPU s/GB", "SMs"):
        shown.add_column(heading, justify="left" if heading == "contender" else "right", no_wrap=True)
    last = None
    for row in report["rows"]:
        if last is not None and row["nbytes"] != last:
            shown.add_section()
        last = row["nbytes"]
        part, cpu = row["of_ceiling"], row["cpu_s_per_gb"]
        shown.add_row(
            f"{row['nbytes'] >> 20}",
            row["contender"],
            f"{row['median_s'] * 1e3:.2f}",
            f"{row['p99_s'] * 1e3:.2f}",
            f"{row['gb_s']:.2f}",
            "" if part is None else f"{part:.0%}",
            "" if cpu is None else f"{cpu:.3f}",
            f"{row['sms']}" if row["sms"] else "",
        )
    return shown


def ratio_table(report: dict[str, Any]) -> Table:
    """The ratios, a line for each pair and a column for each size."""
    sizes = list(dict.fromkeys(ratio["nbytes"] for ratio in report["ratios"]))
    shown = Table(title="Speed of one in units of the other's (medians of single rounds)")
    shown.add_column("of")
    shown.add_column("to")
    for size in sizes:
        shown.add_column(f"{size >> 20} MiB", justify="right")
    for pair in dict.fromkeys((ratio["of"], ratio["to"]) for ratio in report["ratios"]):
        found = {r["nbytes"]: r["ratio"] for r in report["ratios"] if (r["of"], r["to"]) == pair}
        shown.add_row(*pair, *(f"{found[size]:.2f}" if size in found else "" for size in sizes))
    return shown
