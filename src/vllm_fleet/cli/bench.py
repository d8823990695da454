"""``vllm-fleet bench fabric``: parse what to run, show progress, print or write what came out."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from rich.console import Console

from vllm_fleet.bench import fabric
from vllm_fleet.bench.blocks import BLOCK_BYTES, REGIONS
from vllm_fleet.bench.plot import plot as draw
from vllm_fleet.bench.raw_runner import LIBRARIES
from vllm_fleet.core import log
from vllm_fleet.core.errors import BadRequest
from vllm_fleet.fabric.integrity import Mode
from vllm_fleet.fabric.transports import TRANSPORTS

MODES: tuple[Mode, ...] = ("sampled", "full")
UNITS = {"KiB": 10, "MiB": 20, "GiB": 30}
NOT_BENCHED = ("memory",)


def parse_size(text: str) -> int:
    """Bytes of a size like 32MiB or 4GiB; BadRequest for what is no such size."""
    found = re.fullmatch(r"\s*([0-9]+)\s*(KiB|MiB|GiB)\s*", text)
    size = int(found[1]) << UNITS[found[2]] if found else 0
    if size < BLOCK_BYTES * REGIONS:
        least = f"{BLOCK_BYTES * REGIONS >> 20}MiB"
        raise BadRequest(f"--sizes: expected sizes like 32MiB or 4GiB, at least {least}, found {text!r}")
    return size


def parse_names(text: str, known: tuple[str, ...], flag: str) -> tuple[str, ...]:
    """Names separated by commas; BadRequest for an unknown one."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in known:
            raise BadRequest(f"{flag}: expected some of {', '.join(known)}, found {name!r}")
    return names


def parse_cuda(text: str | None) -> tuple[int, int] | None:
    """Two device numbers like 0,1; BadRequest for anything else."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]+),([0-9]+)", text)
    if found is None:
        raise BadRequest(f"--cuda: expected this side's and the other's GPU, like 0,1, found {text!r}")
    return int(found[1]), int(found[2])


def bench_fabric(
    *,
    transports: str,
    against: str,
    sizes: str,
    rounds: int,
    checksums: str,
    cuda: str | None,
    json_file: Path | None,
    plot_file: Path | None,
    as_json: bool,
) -> None:
    """Run the benchmark and show it."""
    log.setup()
    known = tuple(name for name in sorted(TRANSPORTS) if name not in NOT_BENCHED)
    devices = parse_cuda(cuda)
    libraries = parse_names(against, LIBRARIES, "--against")
    asked = tuple(sorted(parse_size(size) for size in sizes.split(",")))
    fitting, free = fabric.sizes_that_fit(asked, devices is not None, len(libraries))
    screen = Console(stderr=True)
    if len(fitting) < len(asked):
        screen.print(f"{free >> 20} MiB are free: sizes up to {max(fitting, default=0) >> 20} MiB are run")
    if not fitting:
        raise BadRequest(f"--sizes: {free >> 20} MiB of memory are free, too few for {min(asked) >> 20} MiB")
    asked_modes = parse_names(checksums, MODES, "--checksums")
    wanted = fabric.Wanted(
        transports=parse_names(transports, known, "--transport"),
        against=libraries,
        sizes=fitting,
        rounds=rounds,
        checksums=tuple(mode for mode in MODES if mode in asked_modes),
        cuda=devices,
    )
    with screen.status("starting") as status:
        report = fabric.run(wanted, lambda words: status.update(words))
    report["command"] = "vllm-fleet " + " ".join(sys.argv[1:])
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=1) + "\n")
    if plot_file is not None:
        draw(report, plot_file)
    if as_json:
        print(json.dumps(report))
        return
    console = Console() if sys.stdout.isatty() else Console(width=100)
    console.print(fabric.table(report))
    if report["ratios"]:
        console.print(fabric.ratio_table(report))
    for name, part in report["checks"].items():
        console.print(
            f"{name}: the checks took {part:.2%} of the time of copying, the first one left out", markup=False
        )
    for name, reason in report["not_run"].items():
        console.print(f"not run: {name}: {reason}", markup=False, soft_wrap=True)
