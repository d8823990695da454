"""What the supervisor asks of whoever starts its processes. tests/contract holds every launcher to it."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from vllm_fleet.launcher.leftovers import Leftover
from vllm_fleet.launcher.processes import ProcessId, Row
from vllm_fleet.launcher.spec import ProcessSpec


class Handle(Protocol):
    """One process, from its start to its burial. Nothing here blocks but ``bury``.

    All it starts is its tree: after ``bury`` nothing of the tree runs, and neither its folder nor files that it left in
    shared memory are there. The same holds some seconds after a launcher elsewhere has lost its supervisor.
    """

    node: str
    """Address of the node it runs on; empty: beside the supervisor."""
    reason: str
    """Why it ended, where neither its exit code nor its log says so."""
    tree: set[ProcessId]
    """Its running processes as of the last ``remember``; empty on another node, whose pids mean nothing here."""
    leftovers: set[Leftover]

    @property
    def spec(self) -> ProcessSpec | None:
        """What runs, with the addresses of where it runs; None until that is known."""

    @property
    def id(self) -> ProcessId | None:
        """The process; None on another node."""

    @property
    def pid(self) -> int:
        """Its number where it runs; 0 until that is known."""

    def poll(self) -> bool:
        """Whether it has ended."""

    def remember(self, rows: Iterable[Row]) -> None:
        """Note its helpers and what they would leave behind, while they live."""

    def signal_group(self, signum: signal.Signals) -> None:
        """Signal it and its helpers; nothing happens when they are gone, and twice is as good as once."""

    def bury(self) -> int:
        """After its end: clean up; its exit code, or the signal's number below 0 when one ended it."""


class Launcher(Protocol):
    """Starts processes somewhere. Used by one thread."""

    def start(self, spec: ProcessSpec, log_file: Path) -> Handle:
        """Start it; what it writes is added to ``log_file``, here.

        Raises:
            FleetError: it cannot be started, as is known at once; the handle's ``reason`` says what is learnt later.
        """

    def close(self) -> None:
        """Give back what was held for starting processes. Ones that run elsewhere are killed."""
