"""What a supervisor shows and how it ends, for whoever started it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from vllm_fleet.launcher.record import FleetRecord


class View(Protocol):
    """Shows a fleet to whoever started it. Called from the supervisor's loop: it must not block."""

    def show(self, record: FleetRecord) -> None:
        """The fleet now; called at every change and a few times a second."""

    def note(self, text: str) -> None:
        """Something happened that the user should read."""

    def output(self, name: str, line: str) -> None:
        """A line that a process wrote."""

    def ready(self, record: FleetRecord) -> None:
        """Every process answers."""


@dataclass(frozen=True)
class Outcome:
    """How the fleet ended."""

    code: int
    reason: str = ""
    lines: tuple[str, ...] = ()
    """The lines of the failed process's log that matter."""
    log: str = ""
    """That log."""
