"""What a policy is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from vllm_fleet.core.ids import InstanceName
from vllm_fleet.router.policies.facts import Facts


class Loads(Protocol):
    """How busy instances are."""

    def load(self, name: str) -> float:
        """Requests there, as far as this router knows: its own now, and what the instance last said of others'."""
        ...


class Policy(Protocol):
    """Chooses one of several instances.

    Called in the request's path: no I/O, no clock, no lock. It may keep state of its own (whose turn it is, who was
    sent which prompt); prefill and decode each have their own policy object. All names fit: ready, reachable, right
    role, compatible. They come in ascending order, no two equal.
    ``facts`` are lazy: what a policy does not read is never computed.
    """

    name: str
    knows_prefixes: bool = False
    """Whether ``held`` can be larger than 0."""

    def choose(self, names: Sequence[InstanceName], loads: Loads, facts: Facts) -> InstanceName | None:
        """One of ``names``; None only when there is none. Choosing twice is allowed, so it counts for nothing yet."""
        ...

    def sent(self, name: InstanceName, facts: Facts) -> None:
        """The request goes to ``name``: the one that was chosen, or another."""
        return

    def held(self, name: InstanceName, facts: Facts) -> float:
        """The share of the prompt whose KV ``name`` holds, from 0.0 to 1.0, as far as this policy knows."""
        return 0.0

    def forget(self, name: InstanceName) -> None:
        """``name`` has left the fleet, or begins a new life with an empty cache."""
        return
