"""What the reactor is told, and what it asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Began:
    """The supervisor owns the run folder and may start processes."""


@dataclass(frozen=True)
class Answered:
    """The answer to one Probe."""

    name: str
    healthy: bool


@dataclass(frozen=True)
class Exited:
    """A process ended, or could not be started (code None)."""

    name: str
    code: int | None
    why: str = ""
    port_taken: bool = False


@dataclass(frozen=True)
class StopAsked:
    """A signal, or ``down``. The second one kills at once."""


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


Event = Began | Answered | Exited | StopAsked | Tick


@dataclass(frozen=True)
class Start:
    """Start the process."""

    name: str


@dataclass(frozen=True)
class Repick:
    """Choose another port for the process."""

    name: str


@dataclass(frozen=True)
class Probe:
    """Ask its /health; Answered follows."""

    name: str


@dataclass(frozen=True)
class Terminate:
    """SIGTERM to its process group."""

    name: str


@dataclass(frozen=True)
class Kill:
    """SIGKILL to its process group."""

    name: str


@dataclass(frozen=True)
class Note:
    """Tell the user and the log."""

    event: Literal["child.gone", "child.restart", "config.port_retry"]
    name: str
    text: str


@dataclass(frozen=True)
class Ready:
    """Every process answers."""


@dataclass(frozen=True)
class Finish:
    """The supervisor's end."""

    code: int


Effect = Start | Repick | Probe | Terminate | Kill | Note | Ready | Finish
