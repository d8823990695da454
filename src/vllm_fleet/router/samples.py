"""Prometheus pages of several workers as one. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

_SAME_EVERYWHERE = ("vllm_fleet_router_instances",)
"""Gauges of what every worker sees alike: the largest is told, not the sum."""

_family = re.compile(rb"# HELP (\S+)").match


def merged(pages: Sequence[bytes]) -> bytes:
    """The sums of all samples; times at which counters began are the earliest."""
    if len(pages) == 1:
        return pages[0]
    order: list[bytes] = []
    lines: dict[bytes, dict[bytes, float]] = {}
    comments: dict[bytes, list[bytes]] = {}
    for page in pages:
        family = b""
        for line in page.splitlines():
            if line.startswith(b"#"):
                begins = _family(line)
                family = begins.group(1) if begins else family
                if family not in comments:
                    order.append(family)
                    comments[family], lines[family] = [], {}
                if line not in comments[family]:
                    comments[family].append(line)
                continue
            key, _, text = line.rpartition(b" ")
            samples = lines.setdefault(family, {})
            value, before = float(text), samples.get(key)
            samples[key] = value if before is None else _together(key.decode("utf-8", "replace"), before, value)
    made = []
    for family in order:
        made += comments[family]
        made += [b"%b %b" % (key, repr(value).encode()) for key, value in lines[family].items()]
    return b"\n".join(made) + b"\n"


def _together(key: str, one: float, other: float) -> float:
    name = key.partition("{")[0]
    if name.endswith("_created"):
        return min(one, other)
    return max(one, other) if name in _SAME_EVERYWHERE else one + other
