"""The picture of a fabric benchmark: speed over size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_fleet.core.errors import ConfigError


def plot(report: dict[str, Any], file: Path) -> None:
    """Write a PNG. Raises ConfigError when matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'vllm-fleet[bench]'") from error
    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    styles = {"transport": "-", "ceiling": ":", "library": "--"}
    rows = report["rows"]
    for name in dict.fromkeys(row["contender"] for row in rows):
        own = [row for row in rows if row["contender"] == name]
        sizes = [row["nbytes"] / 2**20 for row in own]
        axes.plot(sizes, [row["gb_s"] for row in own], styles[own[0]["kind"]], marker="o", label=name)
    axes.set_xscale("log", base=2)
    ticks = sorted({row["nbytes"] / 2**20 for row in rows})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("MiB of scattered 32 KiB blocks")
    axes.set_ylabel("GB/s (median)")
    axes.set_title(f"KV between two processes, {report['memory'].replace('cpu', 'CPU')} memory")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")  # beside the lines, not over them
    figure.savefig(file, dpi=120)
