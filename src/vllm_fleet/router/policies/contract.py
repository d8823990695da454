"""What a policy is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from vllm_fleet.core.ids import InstanceName


class Candidate(NamedTuple):
    """One instance that may take the request."""

    name: InstanceName
    in_flight: int
    """Requests this router has running there."""


class Policy(Protocol):
    """Chooses one of the candidates.

    Called in the request's path: no I/O, no clock, no lock. It may keep a little state of its own (whose turn it is);
    prefill and decode each have their own policy object. Candidates all fit: ready, reachable, right role, compatible.
    """

    name: str

    def choose(self, candidates: Sequence[Candidate]) -> InstanceName | None:
        """The name of one candidate; None only when there is none."""
        ...
