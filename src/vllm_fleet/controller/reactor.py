"""The controller's decisions: (state, event, now) -> effects. No await, no clock, no socket, no disk.

A turn is: ``effects = on_…(state, …, now)``, save ``to_save(state, effects)``, ``settle(state, effects, …)``, then act
on what settle returns. ``on_…`` functions change nothing that is saved (only how long a member may stay silent);
``settle`` does, after saving. So an answer or a broadcast never runs ahead of the disk, and a crash between the steps
loses nothing that anyone was told. All are safe to be told twice.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_fleet.controller.effects import Announce, Broadcast, Effect, Persist, Reply, Save, refuse
from vllm_fleet.controller.state import Entry, FleetState, with_state
from vllm_fleet.core import limits
from vllm_fleet.wire.control import Change, Heartbeat, HeartbeatAck, Member, Register, Registered

NOT_DURABLE = refuse(503, "not_durable", "the controller cannot save to its disk; joins wait until it can")


def on_register(state: FleetState, request: Register, now: float) -> list[Effect]:
    """A life of a member announces itself: known lives get the answer they had, new ones a larger generation."""
    held = state.members.get(request.name)
    if held is not None and held.incarnation == request.incarnation:
        return _register_again(state, held, request, now)
    left = state.past.get((request.name, request.incarnation))
    if left is True:
        return [refuse(409, "left", f"this life of {request.name} has left; register as a new incarnation")]
    if left is False and held is not None and held.state != "suspect":
        return [refuse(409, "replaced", f"generation {held.generation}, which is alive, replaced this {request.name}")]
    holder = next((m for m in state.members.values() if m.url == request.url and m.name != request.name), None)
    if holder is not None and holder.state != "suspect":
        return [refuse(409, "url_taken", f"{request.url} belongs to {holder.name}, which is alive")]
    if held is None and len(state.members) >= limits.MEMBERS_MAX:
        return [refuse(503, "fleet_full", f"the fleet has {limits.MEMBERS_MAX} members, the most there may be")]
    if not state.durable:
        return [NOT_DURABLE]
    revision = state.revision
    effects: list[Effect] = []
    if holder is not None:  # silent, and somebody else answers at its address
        revision += 1
        effects += _change(revision, with_state(holder, "gone"), required=True)
    revision += 1
    slot = state.slot(request.name)
    member = Member(
        name=request.name,
        role=request.role if slot is None else slot.role,
        url=request.url,
        pid=request.pid,
        incarnation=request.incarnation,
        generation=state.generation + 1,
        state=request.state,
        fingerprint=request.fingerprint,
        workers=request.workers,
    )
    effects += _change(revision, member, required=True)
    return [*effects, _registered(state, member.generation, revision)]


def on_heartbeat(state: FleetState, name: str, beat: Heartbeat, now: float) -> list[Effect]:
    """A member says that it lives, and in which state."""
    held = state.members.get(name)
    if held is None or beat.generation > held.generation:  # larger: a number that we have forgotten with our journal
        return [refuse(404, "unknown", f"no member {name} of generation {beat.generation}; register again")]
    if is_old(held, beat.generation):
        return [_fenced(held, beat.generation)]
    reported = state.heard(name, beat.state, now)
    state.pulses[name].load = beat.load
    if reported == held.state:
        return [Reply(200, HeartbeatAck(state.revision, _beat_s(state, held)))]
    revision = state.revision + 1
    return [*_change(revision, with_state(held, reported)), Reply(200, HeartbeatAck(revision, _beat_s(state, held)))]


def on_deregister(state: FleetState, name: str, generation: int, now: float) -> list[Effect]:
    """A member leaves on purpose; its incarnation cannot come back."""
    held = state.members.get(name)
    if held is None:
        return [Reply(204)]
    if is_old(held, generation) or generation > held.generation:
        return [_fenced(held, generation)]
    return [*_change(state.revision + 1, with_state(held, "gone"), left=True), Reply(204)]


def on_tick(state: FleetState, now: float) -> list[Effect]:
    """Judge silence: suspect, then gone. A pause of this process counts against nobody, and while no member at all is
    heard nobody is gone: then it is this process that is cut off, and its members serve.
    """
    late_s = now - state.ticked - state.rules.tick_s
    if late_s >= state.rules.suspect_s or now < state.ticked:
        state.grant_fresh_silence(now)
    elif late_s > 0:
        state.shift_silence(late_s, now)
    if len(state.pulses) > 1 and all(now >= pulse.suspect_at for pulse in state.pulses.values()):
        state.hold_leases(now)
    state.ticked = now
    state.retry_at = min(state.retry_at, now + limits.JOURNAL_RETRY_S)
    revision = state.revision
    effects: list[Effect] = []
    for name, member in state.members.items():
        pulse = state.pulses[name]
        if now >= pulse.gone_at:
            revision += 1
            effects += _change(revision, with_state(member, "gone"))
        elif now >= pulse.suspect_at and member.state != "suspect":
            revision += 1
            effects += _change(revision, with_state(member, "suspect"))
    if not state.durable and now >= state.retry_at:
        state.retry_at = now + limits.JOURNAL_RETRY_S
        effects.append(Save())
    return effects


def on_saved(state: FleetState) -> None:
    """The journal was written anew and holds this state: joins go on."""
    state.durable = True


def to_save(state: FleetState, effects: Sequence[Effect]) -> list[Entry]:
    """What must be on disk before ``settle``; nothing while the disk is known to fail."""
    if not state.durable:
        return []
    return [effect.entry for effect in effects if isinstance(effect, Persist)]


def settle(
    state: FleetState, effects: Sequence[Effect], now: float, *, failed: bool = False, new_controller: str = ""
) -> list[Effect]:
    """Make the changes and return what is left to do.

    ``failed``: saving them did not work. Then the history goes on in memory under the name ``new_controller``, so that
    a restart from the old journal cannot be taken for its continuation; registrations are refused instead of made.
    """
    entries = [effect.entry for effect in effects if isinstance(effect, Persist)]
    rest: list[Effect] = [effect for effect in effects if not isinstance(effect, Persist)]
    if not failed:
        for entry in entries:
            state.apply(entry, now)
        return rest
    required = any(isinstance(effect, Persist) and effect.required for effect in effects)
    if not required:
        for entry in entries:
            state.apply(entry, now)
    state.durable = False
    state.retry_at = now + limits.JOURNAL_RETRY_S
    state.restart_history(new_controller)
    answers = [NOT_DURABLE] if required else [effect for effect in rest if not isinstance(effect, Broadcast)]
    return [Announce(state.snapshot()), *answers]


def is_old(held: Member, generation: int) -> bool:
    """Fencing: whether ``generation`` is a life of this name that a later one replaced. It may change nothing."""
    return generation < held.generation


def _register_again(state: FleetState, held: Member, request: Register, now: float) -> list[Effect]:
    said = (request.url, request.pid, request.fingerprint, request.workers)
    other_role = request.role != held.role and not state.desired.revision  # else roles are given, not said
    if other_role or said != (held.url, held.pid, held.fingerprint, held.workers):
        message = f"incarnation of {held.name} registered before with another role, url, pid, fingerprint or workers"
        return [refuse(409, "incarnation_reused", message)]
    reported = state.heard(held.name, request.state, now)
    if reported == held.state:
        return [_registered(state, held.generation, state.revision)]
    revision = state.revision + 1
    return [*_change(revision, with_state(held, reported)), _registered(state, held.generation, revision)]


def _change(revision: int, member: Member, *, left: bool = False, required: bool = False) -> list[Effect]:
    change = Change(revision, member)
    return [Persist(Entry(change, left), required), Broadcast(change)]


def _registered(state: FleetState, generation: int, revision: int) -> Reply:
    return Reply(200, Registered(generation, revision, state.rules.heartbeat_s, state.rules.lease_s))


def _beat_s(state: FleetState, held: Member) -> float | None:
    """How often to speak, where that is not what was said at first. Who is draining tells by it when it is idle."""
    beat_s = state.rules.beat_s(len(state.members))
    return None if beat_s == state.rules.heartbeat_s or held.state == "draining" else beat_s


def _fenced(held: Member, generation: int) -> Reply:
    message = f"{held.name} is held by generation {held.generation}; generation {generation} may change nothing"
    return refuse(409, "fenced", message)
