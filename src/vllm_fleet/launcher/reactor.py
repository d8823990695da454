"""What a supervisor decides. ``step(fleet, event, now)`` changes ``fleet`` and returns effects; no clock, no process.

Start: controller, and once it answers the router and all instances together. A process that dies or stays silent
before it was ready ends the whole start. From then on what dies is started again (keeping.py), and the fleet becomes
what it is to be (reconcile.py). Stop: SIGTERM to the router, which takes nothing new and lets running requests end
within ``launcher.drain_s``; then to instances, then to the controller, each stage when the one before is over or has
used its share of ``launcher.stop_s``; SIGKILL to what is left at its end.
"""

from __future__ import annotations

from vllm_fleet.launcher import keeping, reconcile
from vllm_fleet.launcher.events import (
    Answered,
    Began,
    Declared,
    DrainAnswer,
    Effect,
    Event,
    Exited,
    Finish,
    Kill,
    Note,
    Probe,
    Ready,
    StopAsked,
    Terminate,
    Tick,
    Watched,
)
from vllm_fleet.launcher.fleet import PROBE_EVERY_S, Child, Fleet, Turn
from vllm_fleet.launcher.keeping import STEADY_S, ending, start
from vllm_fleet.launcher.spec import Kind
from vllm_fleet.wire.control import Desired

KILL_GRACE_S = 1.5  # after SIGKILL; what is still there then hangs in the kernel
STOP_STAGES: tuple[tuple[Kind, float], ...] = (("router", 0.25), ("instance", 0.85), ("controller", 1.0))
"""Kinds in the order they are stopped, and the share of stop_s after which the next stage begins anyway."""
DRAIN_NOTED_S = 1.0  # a stop that waits so long for running requests is explained


def step(fleet: Fleet, event: Event, now: float) -> list[Effect]:
    """Take one event; what to do about it, in order."""
    turn = Turn(fleet, now)
    match event:
        case Began():
            start(turn, [child for child in fleet.children.values() if child.kind == "controller"])
        case Answered(name, healthy):
            if name in fleet.children:
                _on_answer(turn, fleet.children[name], healthy)
        case Exited():
            _on_exit(turn, fleet.children[event.name], event)
        case StopAsked():
            _on_stop_asked(turn)
        case Watched(desired, members):
            fleet.members = members
            _adopt(fleet, desired)
        case Declared(desired):
            fleet.declaring = False
            if desired is not None:
                fleet.declared, fleet.slots, fleet.revision = True, desired.instances, desired.revision
        case DrainAnswer(name):
            if name in fleet.children and fleet.phase == "serving":
                reconcile.on_drain_answer(turn, fleet.children[name], event)
        case Tick():
            _on_tick(turn)
    if fleet.phase == "serving":
        reconcile.reconcile(turn)
    return turn.effects


def _adopt(fleet: Fleet, desired: Desired) -> None:
    if not fleet.declared:
        return
    if not desired.revision:  # it lost its journal, or has not heard us yet
        fleet.declared = False
    elif desired.revision >= fleet.revision:  # what was on its way while we declared may be older
        fleet.slots, fleet.revision = desired.instances, desired.revision


def _on_answer(turn: Turn, child: Child, healthy: bool) -> None:
    fleet = turn.fleet
    child.probing, child.probe_at = False, turn.now + PROBE_EVERY_S
    if not healthy or child.state != "starting":
        return
    turn.set(child, "ready")
    child.was_ready, child.port_tries = True, 1
    if fleet.phase != "starting":
        return
    if child.kind == "controller":
        reconcile.declare(turn)
        start(turn, [other for other in fleet.children.values() if other.state == "waiting"])
    if all(other.state == "ready" for other in fleet.children.values()):
        fleet.phase = "serving"
        turn.effects.append(Ready())


def _on_exit(turn: Turn, child: Child, event: Exited) -> None:
    fleet = turn.fleet
    steady = child.state == "ready" and turn.now - child.since > STEADY_S
    child.alive = child.probing = False
    text = f"{child.name} {ending(event.code, event.why)}"
    if fleet.phase in ("stopping", "stopped", "failed"):
        turn.set(child, "stopped")
        _advance_stop(turn)
    elif child.kind != "instance" and child.was_ready:
        keeping.on_own_death(turn, child, text, steady)
    elif fleet.phase == "serving":
        if child.state in ("stopping", "draining"):
            keeping.on_asked_death(turn, child)
        else:
            keeping.on_instance_death(turn, child, event)
    elif child.was_ready or not keeping.try_another_port(turn, child, event):
        turn.set(child, "gone")
        _fail(turn, child, text if child.was_ready else f"{text} (while it was starting)")


def _fail(turn: Turn, child: Child, reason: str) -> None:
    turn.fleet.failed, turn.fleet.reason = child.name, reason
    _begin_stop(turn)


def _on_stop_asked(turn: Turn) -> None:
    fleet = turn.fleet
    if fleet.phase == "stopping":
        _kill_all(turn)
        return
    if fleet.phase in ("starting", "serving"):
        if fleet.phase == "starting":
            fleet.reason = "stopped before it was ready"
        _begin_stop(turn)


def _begin_stop(turn: Turn) -> None:
    turn.fleet.phase, turn.fleet.stop_began = "stopping", turn.now
    for child in turn.fleet.children.values():
        if not child.alive and child.state not in ("gone", "given_up"):
            turn.set(child, "stopped")
    _advance_stop(turn)


def _on_tick(turn: Turn) -> None:
    fleet = turn.fleet
    if fleet.phase == "stopping":
        _advance_stop(turn)
        return
    for child in list(fleet.children.values()):
        if child.state == "restarting" and turn.now >= child.restart_at:
            start(turn, [child])
        elif child.state == "starting":
            if not _watch_start(turn, child):
                return
        elif child.state == "draining":
            reconcile.advance_leaving(turn, child)
        elif child.state == "stopping" and turn.now >= child.deadline:
            child.deadline = turn.now + KILL_GRACE_S
            turn.effects.append(Kill(child.name))
    if any(child.kind == "controller" and child.state == "ready" for child in fleet.children.values()):
        reconcile.declare(turn)


def _watch_start(turn: Turn, child: Child) -> bool:
    """Ask it, or end what takes too long; False when that ends the fleet's start."""
    fleet = turn.fleet
    if turn.now >= child.deadline:
        waited = f"within {fleet.rules.ready_s:g} s (setting: launcher.ready_s)"
        text = f"{child.name} did not answer GET /health with 200 {waited}"
        if fleet.phase == "starting" and not child.was_ready:
            _fail(turn, child, text)
            return False
        child.deadline = turn.now + fleet.rules.ready_s
        turn.effects.append(Kill(child.name))
    elif not child.probing and turn.now >= child.probe_at:
        child.probing = True
        turn.effects.append(Probe(child.name))
    return True


def _advance_stop(turn: Turn) -> None:
    fleet = turn.fleet
    if fleet.phase != "stopping":
        return
    living = [child for child in fleet.children.values() if child.alive]
    if fleet.drained_at is None:
        routing = any(child.kind == "router" for child in living)
        if routing and not fleet.killed and turn.now - fleet.stop_began < fleet.rules.drain_s:
            _drain_router(turn, living)
            return
        fleet.drained_at = turn.now
    elapsed = turn.now - fleet.drained_at
    for kind, share in STOP_STAGES:
        stage = [child for child in living if child.kind == kind]
        _terminate(turn, stage)
        if stage and elapsed < share * fleet.rules.stop_s:
            break
    if living and elapsed >= fleet.rules.stop_s and not fleet.killed:
        _kill_all(turn)
    if not living or elapsed >= fleet.rules.stop_s + KILL_GRACE_S:
        if living:
            fleet.reason = f"{', '.join(child.name for child in living)} could not be killed"
        fleet.phase = "failed" if fleet.reason else "stopped"
        turn.effects.append(Finish(1 if fleet.reason else 0))


def _drain_router(turn: Turn, living: list[Child]) -> None:
    """Running requests end; whoever starts or leaves meanwhile is not needed for them."""
    fleet = turn.fleet
    _terminate(turn, [child for child in living if child.kind == "router"])
    _terminate(turn, [child for child in living if child.kind == "instance" and not child.was_ready])
    if not fleet.drain_noted and turn.now - fleet.stop_began >= DRAIN_NOTED_S:
        fleet.drain_noted = True
        limit = f"{fleet.rules.drain_s:g} s (launcher.drain_s)"
        text = f"running requests get {limit} to end; a second signal ends them at once"
        turn.effects.append(Note("fleet.draining", "router", text))


def _terminate(turn: Turn, children: list[Child]) -> None:
    for child in children:
        if child.state != "stopping":
            turn.set(child, "stopping")
            turn.effects.append(Terminate(child.name))


def _kill_all(turn: Turn) -> None:
    turn.fleet.killed = True
    turn.effects += [Kill(child.name) for child in turn.fleet.children.values() if child.alive]
