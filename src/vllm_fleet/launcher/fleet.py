"""What a supervisor knows of its fleet: the processes, what they are to be, what the controller says of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from vllm_fleet.launcher.events import Effect
from vllm_fleet.launcher.gpus import Gpus
from vllm_fleet.launcher.record import ChildState, Phase
from vllm_fleet.launcher.spec import Kind
from vllm_fleet.wire.control import Load, Member, Slot
from vllm_fleet.wire.names import Role

PROBE_EVERY_S = 0.25


@dataclass
class Leaving:
    """An instance that is to stop once nobody needs it: drained, and quiet for a while."""

    began: float
    deadline: float
    told: bool = False
    """Whether the controller has told those who watch."""
    asking: bool = False
    ask_at: float = 0.0
    idle_since: float | None = None
    load: Load | None = None
    """How busy it was when last asked."""


@dataclass
class Child:
    """One process of the fleet."""

    name: str
    kind: Kind
    port_fixed: bool = False
    """The user chose its port: when it is taken, another is no help."""
    role: Role | None = None
    """Of an instance: what it is used for now."""
    state: ChildState = "waiting"
    since: float = 0.0
    alive: bool = False
    was_ready: bool = False
    probing: bool = False
    probe_at: float = 0.0
    deadline: float = 0.0
    """Of a start, or of a stop that was asked for."""
    port_tries: int = 1
    restarts: int = 0
    restart_at: float = 0.0
    ordered: int = 0
    """Its slot's ``restarts`` when it was started."""
    began_as: Role | None = None
    generation_before: int = 0
    """Of the member of its name when it was started: this life's is larger."""
    died: list[float] = field(default_factory=list)
    """When it died without being asked to, in the last ``restart_window_s``."""
    leaving: Leaving | None = None
    note: str = ""
    """Why it does not run, in a sentence."""


def one_each(role: Role) -> int:
    """GPUs of an instance unless the user's arguments say otherwise."""
    return 1


@dataclass(frozen=True)
class Rules:
    """What the settings under ``launcher`` say, and what follows from others."""

    ready_s: float = 300.0
    stop_s: float = 8.0
    drain_s: float = 60.0
    restarts_max: int = 5
    restart_window_s: float = 600.0
    quiet_s: float = 1.5
    """An instance that leaves must be idle for so long: requests may be on their way to it."""
    held_s: float = 30.0
    """... and where it cannot tell whether KV is held for others."""
    roles_fixed: bool = False
    """Another role needs another process: vLLM's own connectors."""


@dataclass
class Fleet:
    """The supervisor's whole state."""

    children: dict[str, Child]
    rules: Rules = Rules()
    slots: tuple[Slot, ...] = ()
    gpus: Gpus = field(default_factory=Gpus)
    gpus_of: Callable[[Role], int] = one_each
    rng: random.Random = field(default_factory=random.Random)
    phase: Phase = "starting"
    declared: bool = False
    """The controller has been told what the fleet is to be; from then on it tells us."""
    declaring: bool = False
    declare_at: float = 0.0
    revision: int = 0
    """Of what the fleet is to be."""
    members: Mapping[str, Member] = field(default_factory=dict)
    stop_began: float = 0.0
    drained_at: float | None = None
    """When the router had ended, or its time was over."""
    drain_noted: bool = False
    killed: bool = False
    failed: str | None = None
    """The child that ended the start."""
    reason: str = ""

    def instances(self) -> Iterator[Child]:
        """Those of its processes that are instances."""
        return (child for child in self.children.values() if child.kind == "instance")

    def slot(self, name: str) -> Slot | None:
        """What the instance of this name is to be; None: it is to leave."""
        return next((slot for slot in self.slots if slot.name == name), None)

    def member(self, child: Child) -> Member | None:
        """This life of an instance as the controller knows it."""
        member = self.members.get(child.name)
        return member if member is not None and member.generation > child.generation_before else None

    def serves(self, child: Child) -> bool:
        """Whether requests go there."""
        member = self.member(child)
        return child.state == "ready" and member is not None and member.state == "ready"


@dataclass
class Turn:
    """One step: what it changes, and what it asks for."""

    fleet: Fleet
    now: float
    effects: list[Effect] = field(default_factory=list)

    def set(self, child: Child, state: ChildState) -> None:
        """Another state from now on."""
        child.state, child.since = state, self.now


def role_of(child: Child) -> Role:
    """An instance's role."""
    assert child.role is not None, f"{child.name} is no instance"
    return child.role
