"""Least requests in flight; those with equally few take turns."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_fleet.core.ids import InstanceName
from vllm_fleet.router.policies.contract import Candidate


class LeastLoad:
    """The candidate with the fewest requests in flight; ties go round robin in the order of names."""

    name = "least_load"

    def __init__(self) -> None:
        self._last = InstanceName("")

    def choose(self, candidates: Sequence[Candidate]) -> InstanceName | None:
        if not candidates:
            return None
        fewest = min(candidate.in_flight for candidate in candidates)
        tied = sorted(candidate.name for candidate in candidates if candidate.in_flight == fewest)
        # The next name after the last one chosen: stays fair when members come and go, which an index does not.
        self._last = next((name for name in tied if name > self._last), tied[0])
        return self._last
