"""A picture of what benchmarks/gpu_serving.py measured.

python -m benchmarks.serving_plot docs/benchmarks/2026-11-21-gpu-serving.json docs/benchmarks/2026-11-21-gpu-serving.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

ARMS = ("ours, streamed", "ours, sequential", "NixlConnector")
COLOURS = ("#1b7f5c", "#7fbfa5", "#b5533c")
SERVERS = {"1P1D": "one prefill, one decode", "plain": "two plain instances"}


def draw_extra(axes: Any, rows: list[dict[str, Any]]) -> None:
    """What decode needs on top of a request whose KV it has."""
    lengths = sorted({row["tokens"] for row in rows})
    for index, arm in enumerate(ARMS):
        heights = [next(r["extra_ms"] for r in rows if r["arm"] == arm and r["tokens"] == length) for length in lengths]
        places = [at + 0.27 * (index - 1) for at in range(len(lengths))]
        bars = axes.bar(places, heights, 0.25, label=arm, color=COLOURS[index])
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.axhline(2, color="grey", linewidth=0.8, linestyle="--")
    axes.set_xlabel("prompt, tokens")
    axes.set_title("Decode's extra time for KV from prefill, ms (wanted: 2)", fontsize=10)
    axes.legend(fontsize=8)


def draw_loads(axes: Any, rows: list[dict[str, Any]], key: str, quantile: str, title: str) -> None:
    """One figure of both kinds of serving, under each load."""
    loads = sorted({row["load"] for row in rows}, key=lambda name: (name.split("@")[0], float(name.split("@")[1])))
    for index, arm in enumerate(SERVERS):
        heights = [next(r[key][quantile] for r in rows if r["arm"] == arm and r["load"] == load) for load in loads]
        places = [at + 0.4 * (index - 0.5) for at in range(len(loads))]
        bars = axes.bar(places, heights, 0.38, label=SERVERS[arm], color=(COLOURS[0], "#8a8a8a")[index])
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    axes.set_xticks(range(len(loads)), [load.replace("@", "\n") + "/s" for load in loads], fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)


def main() -> None:
    found = json.loads(Path(sys.argv[1]).read_text())
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.6))
    draw_extra(axes[0], found["a"]["rows"])
    draw_loads(axes[1], found["d"]["rows"], "between_tokens_ms", "p99", "Time between tokens, p99, ms")
    draw_loads(axes[2], found["d"]["rows"], "ttft_ms", "p50", "Time to first token, median, ms")
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(sys.argv[2], dpi=110)


if __name__ == "__main__":
    main()
