"""Decisions about what the fleet is to be, and about members that are told to leave. Pure; see reactor for the turn."""

from __future__ import annotations

from collections import Counter

from msgspec.structs import replace

from vllm_fleet.controller.effects import Broadcast, Effect, Persist, Reply, refuse
from vllm_fleet.controller.reactor import NOT_DURABLE, is_old
from vllm_fleet.controller.state import Entry, FleetState, with_state
from vllm_fleet.wire.control import UPSTREAM_CONNECTOR, Change, Desired, Drain, Draining, Member


def on_desire(state: FleetState, wish: Desired, now: float) -> list[Effect]:
    """Somebody says what the fleet is to be, having seen revision ``wish.revision`` of it.

    The same wish again is answered as the first time: a lost answer may be asked for again.
    """
    if wish.instances == state.desired.instances and state.desired.revision:
        return [Reply(200, state.desired)]
    if wish.revision != state.desired.revision:
        message = f"made from revision {wish.revision}, but {state.desired.revision} is in force: read it and try again"
        return [refuse(409, "stale", message)]
    twice = [name for name, count in Counter(slot.name for slot in wish.instances).items() if count > 1]
    if twice:
        return [refuse(400, "bad_request", f"instances: {twice[0]} is named twice")]
    wanted = {slot.name: slot for slot in wish.instances}
    others = [m for m in state.members.values() if m.name in wanted and m.role != wanted[m.name].role]
    fixed = next((member for member in others if UPSTREAM_CONNECTOR in member.fingerprint), None)
    if fixed is not None:
        return [refuse(400, "role_fixed", _fixed(fixed))]
    if not state.durable:
        return [NOT_DURABLE]
    saved = replace(wish, revision=state.revision + 1)
    effects: list[Effect] = [Persist(Entry(saved), required=True), Broadcast(saved)]
    for number, member in enumerate(others, saved.revision + 1):
        change = Change(number, replace(member, role=wanted[member.name].role))
        effects += [Persist(Entry(change), required=True), Broadcast(change)]
    return [*effects, Reply(200, saved)]


def on_drain(state: FleetState, name: str, drain: Drain, now: float) -> list[Effect]:
    """A member is to get no new requests; again: how busy it is."""
    held = state.members.get(name)
    if held is None or drain.generation > held.generation:
        return [refuse(404, "unknown", f"no member {name} of generation {drain.generation}")]
    if is_old(held, drain.generation):
        message = f"{name} is held by generation {held.generation}, not {drain.generation}"
        return [refuse(409, "fenced", message)]
    pulse = state.pulses[name]
    if pulse.reported == "draining":
        return [Reply(200, Draining(state.revision, pulse.load))]
    change = Change(state.revision + 1, with_state(held, "draining"))
    return [Persist(Entry(change)), Broadcast(change), Reply(200, Draining(change.revision, pulse.load))]


def _fixed(member: Member) -> str:
    return (
        f"{member.name} runs with vLLM's own connector '{member.fingerprint[UPSTREAM_CONNECTOR]}', whose role is "
        f"chosen at its start: it stays '{member.role}'; drain it, and scale the other role up"
    )
