"""Starting processes, and starting them again after they died. Pure; part of launcher.reactor."""

from __future__ import annotations

import signal
from collections.abc import Iterable

from vllm_fleet.core import limits
from vllm_fleet.launcher.events import Exited, Forget, Note, Repick, Start
from vllm_fleet.launcher.fleet import PROBE_EVERY_S, Child, Turn, role_of

STEADY_S = 60.0  # ready for this long: the next restart begins with the shortest wait again
JITTER = 0.5  # an instance's wait is up to so much longer: those that died together do not start together


def ending(code: int | None, why: str = "") -> str:
    """How a process ended, in words."""
    if code is None:
        text = "could not be started"
    elif code < 0:
        text = f"was ended by {signal.Signals(-code).name}"
    else:
        text = f"ended with exit code {code}"
    return f"{text}: {why}" if why else text


def start(turn: Turn, children: Iterable[Child]) -> None:
    """Start them; instances wait for GPUs where too few are free."""
    fleet = turn.fleet
    for child in children:
        if child.kind == "instance" and not _takes_gpus(turn, child):
            continue
        slot = fleet.slot(child.name)
        if slot is not None:
            child.ordered, child.role, child.began_as = slot.restarts, slot.role, slot.role
        member = fleet.members.get(child.name)
        child.generation_before = 0 if member is None else member.generation
        turn.set(child, "starting")
        child.alive, child.probing, child.note = True, False, ""
        child.probe_at = turn.now + PROBE_EVERY_S
        child.deadline = turn.now + fleet.rules.ready_s
        turn.effects.append(Start(child.name))


def _takes_gpus(turn: Turn, child: Child) -> bool:
    fleet = turn.fleet
    if child.name in fleet.gpus.held:
        return True
    slot = fleet.slot(child.name)
    count = fleet.gpus_of(role_of(child) if slot is None else slot.role)
    if fleet.gpus.take(child.name, count):
        return True
    if child.state != "waiting" or not child.note:
        child.note = f"waits for {count} GPUs, {len(fleet.gpus.free)} are free"
        turn.set(child, "waiting")
        turn.effects.append(Note("child.waits", child.name, f"{child.name} {child.note}"))
    return False


def try_another_port(turn: Turn, child: Child, event: Exited) -> bool:
    """Where its port was taken: choose another and start it at once."""
    if not event.port_taken or child.port_fixed or child.port_tries >= limits.PORT_TRIES_MAX:
        return False
    child.port_tries += 1
    text = f"the port of {child.name} was taken; another is tried"
    turn.effects += [Note("config.port_retry", child.name, text), Repick(child.name)]
    start(turn, [child])
    return True


def on_own_death(turn: Turn, child: Child, text: str, steady: bool) -> None:
    """The controller or the router died: it is always started again."""
    child.restarts = 0 if steady else child.restarts
    wait_s = _wait_s(child.restarts)
    child.restarts += 1
    child.restart_at = turn.now + wait_s
    turn.set(child, "restarting")
    turn.effects.append(Note("child.restart", child.name, f"{text}; it is started again in {wait_s:g} s"))


def on_instance_death(turn: Turn, child: Child, event: Exited) -> None:
    """An instance of a fleet that serves died without being asked to."""
    fleet = turn.fleet
    fleet.gpus.give_back(child.name)
    if not child.was_ready and try_another_port(turn, child, event):
        return
    text = f"{child.name} {ending(event.code, event.why)}"
    child.died = [at for at in child.died if at > turn.now - fleet.rules.restart_window_s] + [turn.now]
    if len(child.died) > fleet.rules.restarts_max:
        child.note = (
            f"died {len(child.died)} times within {fleet.rules.restart_window_s:g} s (launcher.restarts_max, "
            f"restart_window_s), last: {text}; start it again with: vllm-fleet restart {child.name}"
        )
        turn.set(child, "given_up")
        turn.effects.append(Note("child.given_up", child.name, f"{child.name} {child.note}"))
        return
    wait_s = _wait_s(len(child.died) - 1) * (1.0 + JITTER * fleet.rng.random())
    child.restart_at = turn.now + wait_s
    child.was_ready = False
    turn.set(child, "restarting")
    turn.effects.append(Note("child.restart", child.name, f"{text}; it is started again in {wait_s:.2g} s"))


def on_asked_death(turn: Turn, child: Child) -> None:
    """An instance ended as it was told to: it is forgotten, or its next life begins."""
    fleet = turn.fleet
    fleet.gpus.give_back(child.name)
    child.leaving, child.was_ready, child.died, child.port_tries = None, False, [], 1
    if fleet.slot(child.name) is None:
        forget(turn, child)
    else:
        turn.set(child, "waiting")


def forget(turn: Turn, child: Child) -> None:
    """It is no part of the fleet any more."""
    del turn.fleet.children[child.name]
    turn.effects.append(Forget(child.name))


def _wait_s(restarts: int) -> float:
    return min(limits.RESTART_BACKOFF_S * 2.0 ** min(restarts, 16), limits.RESTART_BACKOFF_MAX_S)
