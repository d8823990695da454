"""What the reactor is told, and what it asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vllm_fleet.wire.control import Desired, Load, Member

Remark = Literal[
    "child.draining",
    "child.given_up",
    "child.restart",
    "child.waits",
    "config.port_retry",
    "drain.cut",
    "fleet.draining",
]
"""Events of core/log.py that are also told to the user."""


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


@dataclass(frozen=True)
class Watched:
    """The fleet as the controller knows it, and what it is to be; after each change of either."""

    desired: Desired
    members: Mapping[str, Member]


@dataclass(frozen=True)
class Declared:
    """How Declare went: what the fleet is to be now, or None when the controller could not be told."""

    desired: Desired | None


@dataclass(frozen=True)
class DrainAnswer:
    """The answer to one AskDrain. ``load`` None: nobody could say how busy it is."""

    name: str
    told: bool
    load: Load | None = None


Event = Began | Answered | Exited | StopAsked | Tick | Watched | Declared | DrainAnswer


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

    event: Remark
    name: str
    text: str


@dataclass(frozen=True)
class Declare:
    """Tell the controller what the fleet is to be, unless it has been told since; Declared follows."""


@dataclass(frozen=True)
class AskDrain:
    """Have the controller tell everybody that this life of an instance gets no new requests (no generation: nobody
    knows it), and ask how busy it is; DrainAnswer follows."""

    name: str
    generation: int | None


@dataclass(frozen=True)
class Forget:
    """An instance is no part of the fleet any more: its port and folder are free."""

    name: str


@dataclass(frozen=True)
class Ready:
    """Every process answers."""


@dataclass(frozen=True)
class Finish:
    """The supervisor's end."""

    code: int


Effect = Start | Repick | Probe | Terminate | Kill | Note | Declare | AskDrain | Forget | Ready | Finish
