"""docs/metrics.md and the router's page say the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vllm_fleet.router.audit import Audit
from vllm_fleet.router.fleet_view import FleetView
from vllm_fleet.router.metrics import Metrics

_ROW = re.compile(r"\| `(\w+)` \| (\w+) \| ([^|]*)\| ([^|]+)\|")

Family = tuple[str, str, tuple[str, ...]]


def served() -> set[Family]:
    """Name as it is scraped, type and labels of every family, also of those that have no samples yet."""
    found = set()
    for collector in Metrics(FleetView(), Audit())._registry._collector_to_names:
        families: list[Any] = [collector] if hasattr(collector, "_labelnames") else list(collector.collect())
        for family in families:
            name = getattr(family, "_name", "") or family.name
            kind = getattr(family, "_type", "") or family.type
            found.add((f"{name}_total" if kind == "counter" else name, kind, tuple(sorted(family._labelnames))))
    return found


def documented() -> set[Family]:
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    return {(name, kind, tuple(sorted(re.findall(r"`(\w+)`", labels)))) for name, kind, labels, _ in _ROW.findall(text)}


def test_the_manual_and_the_page_agree() -> None:
    assert served() - documented() == set(), "not in docs/metrics.md"
    assert documented() - served() == set(), "in docs/metrics.md only"
