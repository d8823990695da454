"""Where most of the prompt's KV is already, unless that instance is too busy."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_fleet.core.ids import InstanceName
from vllm_fleet.router.policies.contract import Loads, Policy
from vllm_fleet.router.policies.facts import BYTES_PER_TOKEN, Facts
from vllm_fleet.router.prefix.book import PrefixBook


class Prefix(Policy):
    """The least cost: what of the prompt is missing there, and ``load_tokens`` for each request there.

    So a prefix that everybody asks for spreads to a second instance as soon as waiting at the first costs more than
    computing it once more; from then on both hold it. Those of equal cost: who holds least, then in turn.
    """

    name = "prefix"
    knows_prefixes = True

    def __init__(self, book: PrefixBook, load_tokens: float) -> None:
        self._book, self._request_bytes = book, load_tokens * BYTES_PER_TOKEN
        self._last = ""

    def choose(self, names: Sequence[InstanceName], loads: Loads, facts: Facts) -> InstanceName | None:
        if len(names) < 2:
            return names[0] if names else None
        hits = self._book.hits(facts, names)
        best, least = names[0], (float("inf"), 0, True, "")
        for name in names:
            cost = loads.load(name) * self._request_bytes - hits.get(name, 0)
            if cost <= least[0]:
                mine = (cost, self._book.holds(name), name <= self._last, name)
                if mine < least:
                    best, least = name, mine
        return best

    def sent(self, name: InstanceName, facts: Facts) -> None:
        self._last = name
        self._book.sent(name, facts)

    def held(self, name: InstanceName, facts: Facts) -> float:
        size = len(facts.prompt.text)
        return min(1.0, self._book.hits(facts, (name,)).get(name, 0) / size) if size else 0.0

    def forget(self, name: InstanceName) -> None:
        self._book.forget(name)
