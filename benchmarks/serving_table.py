"""The short table that benchmarks/gpu_serving.py prints last."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

TOLD = ("outcome=", "fail", "bytes")
"""Counters whose name or labels hold one of these words are shown."""


def table(report: Mapping[str, Any]) -> str:
    """What was measured, phase by phase, errors included; nothing raw."""
    lines: list[str] = []
    for name, why in report.get("not_started", {}).items():
        lines += [f"{name} did not start:", *(f"  {line[:160]}" for line in why[-12:])]
    for name, show in (("answers", _answers), ("a", _handoffs), ("b", _first_tokens), ("c", _batch), ("d", _loads)):
        if name in report:
            found = report[name]
            lines.append(f"--- {name} ({found.get('took_s', 0)} s) {found.get('error', '')}")
            try:
                lines += show(found)
            except LookupError as error:  # a phase cut off in the midst: the others are shown all the same
                lines.append(f"cannot be shown, see the JSON: no {error}")
            counters = found.get("counters", {})
            lines += [f"{key} {value:.4g}" for key, value in counters.items() if any(word in key for word in TOLD)]
            failed = found.get("failed")
            for who, what in failed.items() if isinstance(failed, dict) else [("failed", failed or [])]:
                lines += [f"{who}: {len(what)} failed, first: {what[0][:200]}"] if what else []
    return "\n".join(lines)


def _answers(found: Mapping[str, Any]) -> Iterator[str]:
    if "asked" in found:
        yield (
            f"answers equal to plain's, of {found['asked']}: {found['through_fleet']} through the fleet, "
            f"{found['plain_again']} of plain asked again; {found['distinct']} distinct"
        )


def _handoffs(found: Mapping[str, Any]) -> Iterator[str]:
    headings = ("extra ms", "worst", "after", "local", "ttft", "not local")
    yield f"{'':18}{'tokens':>7}{'rounds':>7}" + "".join(f"{heading:>10}" for heading in headings)
    for row in sorted(found.get("rows", []), key=lambda row: (row["tokens"], row["arm"])):
        if row["rounds"]:
            figures = (row["extra_ms"], row["extra_ms_worst"], row["after_prefill_ms"], row["local_ms"], row["ttft_ms"])
            cells = "".join(f"{figure:10.2f}" for figure in figures)
            yield f"{row['arm']:18}{row['tokens']:7}{row['rounds']:7}{cells}{row['not_local']:10}"


def _first_tokens(found: Mapping[str, Any]) -> Iterator[str]:
    for row in found.get("rows", []):
        yield (
            f"{row['tokens']:6} tokens, {row['rounds']} rounds: plain {row['plain_ms']:.1f} ms, "
            f"fleet {row['fleet_ms']:.1f} ms, ratio {row['ratio']:.3f}"
        )


def _batch(found: Mapping[str, Any]) -> Iterator[str]:
    for row in found.get("rows", []):
        quiet, busy = row["quiet"], row["handoffs"]
        yield (
            f"asked {row['asked']:7} p50 {quiet['p50']:.2f} -> {busy['p50']:.2f} ms, p99 {quiet['p99']:.2f} -> "
            f"{busy['p99']:.2f} ms (ratio {row['p99_ratio']:.3f}), worst {quiet['max']:.1f} -> {busy['max']:.1f} ms, "
            f"together {row['came_together']}"
        )
    if found.get("pairs"):
        yield f"{found['pairs']} pairs, median of their p99 ratios {found['p99_ratio_median_of_pairs']:.3f}"


def _loads(found: Mapping[str, Any]) -> Iterator[str]:
    latencies = f"{'ttft p50':>10}{'p99':>9}{'tpot p50':>10}{'p99':>8}{'gap p99':>9}{'max':>8}"
    yield f"{'load':9}{'arm':7}{'done':>9}{latencies}  good/s"
    for row in found.get("rows", []):
        cells = [f"{row['load']:9}{row['arm']:7}{row['answered']:>5}/{row['asked']:<3}"]
        if row["answered"]:
            ttft, tpot, gap = row["ttft_ms"], row["tpot_ms"], row["between_tokens_ms"]
            cells.append(f"{ttft['p50']:10.1f}{ttft['p99']:9.1f}{tpot['p50']:10.2f}{tpot['p99']:8.2f}")
            cells.append(f"{gap['p99']:9.2f}{gap['max']:8.1f}")
        cells.append("  " + " ".join(f"{good:.2f}" for good in row["good_per_s"].values()))
        yield "".join(cells)
    if found.get("rows"):
        yield "good/s for " + "; ".join(found["rows"][0]["good_per_s"])
    yield from (f"skipped {line}" for line in found.get("skipped", []))
