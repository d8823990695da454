"""What a supervisor decides. ``step(fleet, event, now)`` changes ``fleet`` and returns effects; no clock, no process.

Start: controller, and once it answers the router and all instances together. A process that dies or stays silent before
it was ready ends the whole start. Later an instance that dies is gone and the fleet goes on; controller and router are
started again. Stop: SIGTERM to the router, then instances, then the controller, each stage when the one before is over
or has used its share of ``launcher.stop_s``; SIGKILL to what is left at its end.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable
from dataclasses import dataclass, field

from vllm_fleet.core import limits
from vllm_fleet.launcher.events import (
    Answered,
    Began,
    Effect,
    Event,
    Exited,
    Finish,
    Kill,
    Note,
    Probe,
    Ready,
    Repick,
    Start,
    StopAsked,
    Terminate,
    Tick,
)
from vllm_fleet.launcher.record import ChildState, Phase
from vllm_fleet.launcher.spec import Kind

PROBE_EVERY_S = 0.25
STEADY_S = 60.0  # ready for this long: the next restart begins with the shortest wait again
KILL_GRACE_S = 1.5  # after SIGKILL; what is still there then hangs in the kernel
STOP_STAGES: tuple[tuple[Kind, float], ...] = (("router", 0.25), ("instance", 0.85), ("controller", 1.0))
"""Kinds in the order they are stopped, and the share of stop_s after which the next stage begins anyway."""


@dataclass
class Child:
    """One process of the fleet."""

    name: str
    kind: Kind
    port_fixed: bool = False
    """The user chose its port: when it is taken, another is no help."""
    state: ChildState = "waiting"
    since: float = 0.0
    alive: bool = False
    was_ready: bool = False
    probing: bool = False
    probe_at: float = 0.0
    deadline: float = 0.0
    port_tries: int = 1
    restarts: int = 0
    restart_at: float = 0.0


@dataclass
class Fleet:
    """The supervisor's whole state."""

    children: dict[str, Child]
    ready_s: float
    stop_s: float
    phase: Phase = "starting"
    stop_began: float = 0.0
    killed: bool = False
    failed: str | None = None
    """The child that ended the start."""
    reason: str = ""


@dataclass
class _Turn:
    fleet: Fleet
    now: float
    effects: list[Effect] = field(default_factory=list)


def step(fleet: Fleet, event: Event, now: float) -> list[Effect]:
    """Take one event; what to do about it, in order."""
    turn = _Turn(fleet, now)
    match event:
        case Began():
            _start(turn, (child for child in fleet.children.values() if child.kind == "controller"))
        case Answered(name, healthy):
            _on_answer(turn, fleet.children[name], healthy)
        case Exited():
            _on_exit(turn, fleet.children[event.name], event)
        case StopAsked():
            _on_stop_asked(turn)
        case Tick():
            _on_tick(turn)
    return turn.effects


def ending(code: int | None, why: str = "") -> str:
    """How a process ended, in words."""
    if code is None:
        text = "could not be started"
    elif code < 0:
        text = f"was ended by {signal.Signals(-code).name}"
    else:
        text = f"ended with exit code {code}"
    return f"{text}: {why}" if why else text


def _set(turn: _Turn, child: Child, state: ChildState) -> None:
    child.state, child.since = state, turn.now


def _start(turn: _Turn, children: Iterable[Child]) -> None:
    for child in children:
        _set(turn, child, "starting")
        child.alive, child.probing = True, False
        child.probe_at = turn.now + PROBE_EVERY_S
        child.deadline = turn.now + turn.fleet.ready_s
        turn.effects.append(Start(child.name))


def _on_answer(turn: _Turn, child: Child, healthy: bool) -> None:
    fleet = turn.fleet
    child.probing, child.probe_at = False, turn.now + PROBE_EVERY_S
    if not healthy or child.state != "starting":
        return
    _set(turn, child, "ready")
    child.was_ready = True
    if fleet.phase != "starting":
        return
    if child.kind == "controller":
        _start(turn, (other for other in fleet.children.values() if other.state == "waiting"))
    if all(other.state == "ready" for other in fleet.children.values()):
        fleet.phase = "serving"
        turn.effects.append(Ready())


def _on_exit(turn: _Turn, child: Child, event: Exited) -> None:
    fleet = turn.fleet
    steady = child.state == "ready" and turn.now - child.since > STEADY_S
    child.alive = child.probing = False
    text = f"{child.name} {ending(event.code, event.why)}"
    if fleet.phase in ("stopping", "stopped", "failed"):
        _set(turn, child, "stopped")
        _advance_stop(turn)
    elif child.kind != "instance" and child.was_ready:
        child.restarts = 0 if steady else child.restarts
        wait = min(limits.RESTART_BACKOFF_S * 2.0 ** min(child.restarts, 16), limits.RESTART_BACKOFF_MAX_S)
        child.restarts += 1
        child.restart_at = turn.now + wait
        _set(turn, child, "restarting")
        turn.effects.append(Note("child.restart", child.name, f"{text}; it is started again in {wait:g} s"))
    elif fleet.phase == "serving":
        _set(turn, child, "gone")
        turn.effects.append(Note("child.gone", child.name, f"{text}; the fleet goes on without it"))
    elif event.port_taken and not child.port_fixed and not child.was_ready and child.port_tries < limits.PORT_TRIES_MAX:
        child.port_tries += 1
        turn.effects.append(
            Note("config.port_retry", child.name, f"the port of {child.name} was taken; another is tried")
        )
        turn.effects.append(Repick(child.name))
        _start(turn, [child])
    else:
        _set(turn, child, "gone")
        _fail(turn, child, text if child.was_ready else f"{text} (while it was starting)")


def _fail(turn: _Turn, child: Child, reason: str) -> None:
    turn.fleet.failed, turn.fleet.reason = child.name, reason
    _begin_stop(turn)


def _on_stop_asked(turn: _Turn) -> None:
    fleet = turn.fleet
    if fleet.phase == "stopping":
        _kill_all(turn)
        return
    if fleet.phase in ("starting", "serving"):
        if fleet.phase == "starting":
            fleet.reason = "stopped before it was ready"
        _begin_stop(turn)


def _begin_stop(turn: _Turn) -> None:
    turn.fleet.phase, turn.fleet.stop_began = "stopping", turn.now
    for child in turn.fleet.children.values():
        if not child.alive and child.state != "gone":
            _set(turn, child, "stopped")
    _advance_stop(turn)


def _on_tick(turn: _Turn) -> None:
    fleet = turn.fleet
    if fleet.phase == "stopping":
        _advance_stop(turn)
        return
    for child in fleet.children.values():
        if child.state == "restarting" and turn.now >= child.restart_at:
            _start(turn, [child])
        elif child.state == "starting" and turn.now >= child.deadline:
            waited = f"within {fleet.ready_s:g} s (setting: launcher.ready_s)"
            text = f"{child.name} did not answer GET /health with 200 {waited}"
            if fleet.phase == "starting" and not child.was_ready:
                _fail(turn, child, text)
                return
            child.deadline = turn.now + fleet.ready_s
            turn.effects.append(Kill(child.name))
        elif child.state == "starting" and not child.probing and turn.now >= child.probe_at:
            child.probing = True
            turn.effects.append(Probe(child.name))


def _advance_stop(turn: _Turn) -> None:
    fleet = turn.fleet
    if fleet.phase != "stopping":
        return
    living = [child for child in fleet.children.values() if child.alive]
    elapsed = turn.now - fleet.stop_began
    for kind, share in STOP_STAGES:
        stage = [child for child in living if child.kind == kind]
        for child in stage:
            if child.state != "stopping":
                _set(turn, child, "stopping")
                turn.effects.append(Terminate(child.name))
        if stage and elapsed < share * fleet.stop_s:
            break
    if living and elapsed >= fleet.stop_s and not fleet.killed:
        _kill_all(turn)
    if not living or elapsed >= fleet.stop_s + KILL_GRACE_S:
        if living:
            fleet.reason = f"{', '.join(child.name for child in living)} could not be killed"
        fleet.phase = "failed" if fleet.reason else "stopped"
        turn.effects.append(Finish(1 if fleet.reason else 0))


def _kill_all(turn: _Turn) -> None:
    turn.fleet.killed = True
    turn.effects += [Kill(child.name) for child in turn.fleet.children.values() if child.alive]
