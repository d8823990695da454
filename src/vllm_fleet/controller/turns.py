"""Several turns with one write to the store: what many members ask at once is decided, saved and told together. Pure.

Decisions are made on a draft, one seeing what the earlier ones changed. When the write has succeeded the draft becomes
the state; when it fails the draft is thrown away and every decision is made again, alone. So nobody is told, or can
read, what is not on disk, exactly as with single turns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from vllm_fleet.controller import reactor
from vllm_fleet.controller.effects import Effect
from vllm_fleet.controller.state import Entry, FleetState, Pulse

Decide = Callable[[FleetState, float], list[Effect]]
"""One of the reactor's ``on_…`` functions, with its event filled in."""


@dataclass(frozen=True)
class Together:
    """What several decisions come to: ``shown`` is left to do for each, once ``entries`` are saved."""

    draft: FleetState
    entries: list[Entry]
    shown: list[list[Effect]]


def decide_together(state: FleetState, decisions: Sequence[Decide], now: float) -> Together:
    """Make the decisions in order; ``state`` stays as it is. Raises what a decision raises."""
    draft = draft_of(state)
    entries: list[Entry] = []
    shown: list[list[Effect]] = []
    for decide in decisions:
        effects = decide(draft, now)
        entries += reactor.to_save(draft, effects)
        shown.append(reactor.settle(draft, effects, now))
    return Together(draft, entries, shown)


def draft_of(state: FleetState) -> FleetState:
    """A copy that shares nothing that can change."""
    draft = copy.copy(state)
    for part in fields(state):
        setattr(draft, part.name, copy.copy(getattr(state, part.name)))
    draft.pulses = {name: _copied(pulse) for name, pulse in state.pulses.items()}
    return draft


def _copied(pulse: Pulse) -> Pulse:
    """copy.copy, but ten times as fast: there is a pulse for each member."""
    copied = object.__new__(Pulse)
    copied.__dict__.update(pulse.__dict__)
    return copied


def become(state: FleetState, draft: FleetState) -> None:
    """Make the draft the state, which everybody who holds it sees."""
    for part in fields(state):
        setattr(state, part.name, getattr(draft, part.name))
