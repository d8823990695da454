"""How busy instances are: what this router has there, and what they say of themselves. Pure: time is passed in."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from vllm_fleet.core import limits

_GAUGES = re.compile(
    rb"^vllm:(num_requests_running|num_requests_waiting|kv_cache_usage_perc|cache_config_info)"
    rb"(?:\{([^}\n]*)\})? ([^ \n]+)",
    re.MULTILINE,
)
_BLOCKS = re.compile(rb'\bnum_gpu_blocks="(\d+)"')
_BLOCK_TOKENS = re.compile(rb'\bblock_size="(\d+)"')
_FULL = 0.9  # of the KV cache: from here on an engine soon has to preempt, so it counts as busier than it says
_FULL_WEIGHT = 10.0  # ... twice as busy when nothing is left


class Gauges(NamedTuple):
    """What one instance says, summed over its engines."""

    requests: float = 0.0
    """Running and waiting."""
    kv_used: float = 0.0
    """Share of the KV cache that running requests use; of the fullest engine."""
    cache_tokens: int = 0
    """Size of its KV cache; 0: it did not say."""


def parse_gauges(page: bytes) -> Gauges | None:
    """The gauges of a /metrics page; None when there are none: it is no vLLM, or says things nobody can read."""
    requests, used, tokens, found = 0.0, 0.0, 0, False
    for name, labels, text in _GAUGES.findall(page):
        try:
            value = float(text)
        except ValueError:
            return None
        if name == b"cache_config_info":
            blocks, size = _BLOCKS.search(labels), _BLOCK_TOKENS.search(labels)
            if blocks is not None and size is not None:
                tokens += int(blocks[1]) * int(size[1])
            continue
        if not 0.0 <= value < 1e9:
            return None
        found = True
        if name == b"kv_cache_usage_perc":
            used = max(used, min(value, 1.0))
        else:
            requests += value
    return Gauges(requests, used, tokens) if found else None


class LoadBook:
    """Loads of all instances. Readings are aged by whoever takes them: asking costs two look-ups."""

    def __init__(self, in_flight: Callable[[str], int]) -> None:
        self._in_flight = in_flight
        self._others: dict[str, float] = {}
        self._taken: dict[str, float] = {}

    def load(self, name: str) -> float:
        """This router's requests there, and those it read of that are not its own."""
        return self._in_flight(name) + self._others.get(name, 0.0)

    def take(self, name: str, gauges: Gauges, now: float) -> None:
        """A fresh reading. What this router has there now is taken for part of what was read."""
        others = max(0.0, gauges.requests - self._in_flight(name))
        full = max(0.0, gauges.kv_used - _FULL) * _FULL_WEIGHT
        others += full * max(gauges.requests, 1.0)
        self._taken[name] = now
        if others:
            self._others[name] = others
        else:
            self._others.pop(name, None)

    def age(self, now: float) -> None:
        """Drop readings that are too old to be true."""
        for name in [name for name, at in self._taken.items() if now - at > limits.GAUGES_STALE_S]:
            self.forget(name)

    def forget(self, name: str) -> None:
        """Drop what was read of ``name``."""
        self._taken.pop(name, None)
        self._others.pop(name, None)
