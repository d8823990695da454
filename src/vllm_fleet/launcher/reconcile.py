"""What the fleet is to be against what it is: who joins, who leaves, who is replaced by a new life. Pure.

An instance leaves in steps: the controller tells those who watch that it gets nothing new (``AskDrain``); when it has
had nothing to do for ``quiet_s`` it is stopped; after ``drain_s`` in any case, and then by SIGKILL: vLLM would answer
what it cuts off with 200 and a part of the text, but of a connection that breaks the router knows what to do.
"""

from __future__ import annotations

from vllm_fleet.launcher.events import AskDrain, Declare, DrainAnswer, Kill, Note, Terminate
from vllm_fleet.launcher.fleet import Child, Fleet, Leaving, Turn, role_of
from vllm_fleet.launcher.keeping import forget, start
from vllm_fleet.wire.control import Slot
from vllm_fleet.wire.names import Role

ASK_EVERY_S = 0.3
DECLARE_EVERY_S = 1.0


def declare(turn: Turn) -> None:
    """Tell the controller what the fleet is to be, until it knows."""
    fleet = turn.fleet
    if not fleet.declared and not fleet.declaring and turn.now >= fleet.declare_at:
        fleet.declaring, fleet.declare_at = True, turn.now + DECLARE_EVERY_S
        turn.effects.append(Declare())


def reconcile(turn: Turn) -> None:
    """Begin what is to be begun now. Safe to call at any time in a fleet that serves."""
    fleet = turn.fleet
    for slot in fleet.slots:
        if slot.name not in fleet.children:
            fleet.children[slot.name] = Child(slot.name, "instance", role=slot.role, since=turn.now)
    awaited = _awaited(fleet)
    for child in list(fleet.instances()):
        wanted = fleet.slot(child.name)
        if child.leaving is not None or child.state == "stopping":
            continue
        if wanted is None:
            if child.name not in awaited:
                _leave(turn, child)
            continue
        outdated = _outdated(fleet, child, wanted)
        if not (fleet.rules.roles_fixed and child.alive):
            child.role = wanted.role  # also while it waits for its turn: others look at it to know theirs
        if outdated:
            if not wanted.rolling or _has_its_turn(fleet, child):
                _leave(turn, child)
        elif child.state == "ready":
            child.note = ""
        if child.state == "waiting":
            start(turn, [child])


def advance_leaving(turn: Turn, child: Child) -> None:
    """Time has passed for an instance that leaves."""
    leaving, fleet = child.leaving, turn.fleet
    assert leaving is not None
    if turn.now >= leaving.deadline:
        limit = f"{fleet.rules.drain_s:g} s (launcher.drain_s)"
        text = f"{child.name} is stopped after {limit}{_cut(leaving)}"
        turn.effects.append(Note("drain.cut", child.name, text))
        stop(turn, child, kill=True)
    elif not leaving.asking and turn.now >= leaving.ask_at:
        leaving.asking = True
        member = fleet.member(child)
        turn.effects.append(AskDrain(child.name, None if member is None else member.generation))


def on_drain_answer(turn: Turn, child: Child, answer: DrainAnswer) -> None:
    """Whether watchers know that it drains, and how busy it is."""
    leaving, fleet = child.leaving, turn.fleet
    if leaving is None or child.state != "draining":
        return
    leaving.asking, leaving.ask_at = False, turn.now + ASK_EVERY_S
    leaving.told |= answer.told
    leaving.load = answer.load
    if not leaving.told or answer.load is None or answer.load.requests or answer.load.held:
        leaving.idle_since = None
        return
    if leaving.idle_since is None:
        leaving.idle_since = turn.now
    unsure = answer.load.held is None and child.began_as != "decode"
    rules = fleet.rules
    if turn.now - leaving.idle_since >= (max(rules.held_s, rules.quiet_s) if unsure else rules.quiet_s):
        stop(turn, child)


def stop(turn: Turn, child: Child, *, kill: bool = False) -> None:
    """End an instance's processes; its slot decides what follows."""
    turn.set(child, "stopping")
    child.deadline = turn.now + turn.fleet.rules.stop_s
    turn.effects.append(Kill(child.name) if kill else Terminate(child.name))


def _leave(turn: Turn, child: Child) -> None:
    fleet = turn.fleet
    if not child.alive:
        child.died, child.port_tries = [], 1
        if fleet.slot(child.name) is None:
            forget(turn, child)
        else:
            turn.set(child, "waiting")
        return
    member = fleet.member(child)
    if not child.was_ready and (member is None or member.state == "starting"):
        stop(turn, child)  # nobody has sent it anything
        return
    child.leaving = Leaving(turn.now, turn.now + fleet.rules.drain_s)
    child.probing = False
    turn.set(child, "draining")
    turn.effects.append(Note("child.draining", child.name, f"{child.name} gets no new requests; running ones finish"))


def _awaited(fleet: Fleet) -> set[str]:
    """Instances that may leave only when another one serves in their place."""
    pending = set()
    for slot in fleet.slots:
        child = fleet.children.get(slot.name)
        if slot.replaces and (child is None or not fleet.serves(child)):
            pending.add(slot.replaces)
    return pending


def _outdated(fleet: Fleet, child: Child, slot: Slot) -> bool:
    begun = child.alive or child.state != "waiting"
    other_role = fleet.rules.roles_fixed and child.began_as is not None and child.began_as != slot.role
    return begun and (child.ordered < slot.restarts or (child.alive and other_role))


def _has_its_turn(fleet: Fleet, child: Child) -> bool:
    """Whether a rolling restart may go on with this one: all others serve, and one of them does what it does."""
    others = [other for other in fleet.instances() if other is not child]
    if not all(fleet.serves(other) or _not_in_the_way(fleet, other) for other in others):
        return False
    if not child.alive:
        return True
    role = role_of(child)
    alike: tuple[Role, ...] = ("both", "decode") if role == "both" else (role, "both")
    if any(fleet.serves(other) and other.role in alike for other in others):
        return True
    child.note = f"waits with its restart until another '{alike[0]}' or '{alike[1]}' serves"
    return False


def _not_in_the_way(fleet: Fleet, other: Child) -> bool:
    """Given up before this round of restarts: it waits for nothing, and nobody waits for it."""
    slot = fleet.slot(other.name)
    return other.state == "given_up" and (slot is None or not slot.rolling or other.ordered < slot.restarts)


def _cut(leaving: Leaving) -> str:
    load = leaving.load
    if load is None or (not load.requests and not load.held):
        return "" if leaving.told else "; the controller could not be told"
    held = "" if not load.held else f" and the KV of {load.held} that nobody took"
    return f", which cuts {load.requests} requests{held}"
