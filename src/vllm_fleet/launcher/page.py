"""A page of Prometheus's text format, read for a few families only. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

Labels = Mapping[str, str]

_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)",?')


class Page:
    """The samples of some families."""

    def __init__(self, text: str, prefixes: tuple[str, ...]) -> None:
        """Samples whose names begin with one of ``prefixes``; what cannot be read is passed over."""
        self._samples: dict[str, list[tuple[Labels, float]]] = {}
        for line in text.splitlines():
            if not line.startswith(prefixes):
                continue
            series, _, number = line.rpartition(" ")
            name, _, labels = series.partition("{")
            try:
                value = float(number)
            except ValueError:
                continue
            self._samples.setdefault(name, []).append((dict(_LABEL.findall(labels)), value))

    def samples(self, name: str) -> Iterable[tuple[Labels, float]]:
        """Every sample of this name."""
        return self._samples.get(name, ())

    def total(self, name: str, **labels: str) -> float:
        """The sum of those that have these labels; 0 where there is none."""
        return sum(value for found, value in self.samples(name) if labels.items() <= found.items())

    def has(self, name: str) -> bool:
        """Whether there is one."""
        return name in self._samples

    def largest(self, name: str) -> float | None:
        """The largest of all; None where there is none."""
        return max((value for _, value in self.samples(name)), default=None)

    def buckets(self, name: str, **labels: str) -> dict[float, float]:
        """A histogram's cumulative buckets by upper end, summed over those that have these labels."""
        found: dict[float, float] = {}
        for each, value in self.samples(f"{name}_bucket"):
            if labels.items() <= each.items():
                try:
                    end = float(each.get("le", ""))
                except ValueError:
                    continue
                found[end] = found.get(end, 0.0) + value
        return found


def quantile(share: float, before: Mapping[float, float], after: Mapping[float, float]) -> float | None:
    """The value under which ``share`` of what came between two states of a histogram lies; None: nothing came.

    Within a bucket all values count as evenly spread; above the last end, as that end.
    """
    grown = {end: max(0.0, count - before.get(end, 0.0)) for end, count in after.items()}
    ends = sorted(grown)
    total = grown[ends[-1]] if ends else 0.0
    if not total:
        return None
    wanted, low, seen = share * total, 0.0, 0.0
    for end in ends:
        if grown[end] >= wanted:
            if end == float("inf"):
                return low
            inside = grown[end] - seen
            return end if not inside else low + (end - low) * (wanted - seen) / inside
        low, seen = end, grown[end]
    return low
