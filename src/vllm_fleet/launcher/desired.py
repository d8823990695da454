"""What a fleet is to be: how the commands change it, and whether it has become so. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from msgspec.structs import replace

from vllm_fleet.core import limits
from vllm_fleet.core.errors import BadRequest
from vllm_fleet.launcher.record import FleetRecord, GpuRecord, ProcessRecord
from vllm_fleet.wire.control import Member, Slot
from vllm_fleet.wire.names import ROLES, Role

Slots = tuple[Slot, ...]


def counts(slots: Iterable[Slot]) -> dict[str, int]:
    """Instances by role."""
    found = Counter(slot.role for slot in slots)
    return {role: found[role] for role in ROLES}


def scaled(slots: Slots, wanted: Mapping[Role, int], busy: Collection[str] = ()) -> Slots:
    """So many instances of each role in ``wanted``; the newest leave first. Roles not in it stay as they are.

    Args:
        busy: names that a new instance must not take, though they have no slot: instances that still leave.
    """
    made = list(slots)
    for role, count in wanted.items():
        of_role = [slot for slot in made if slot.role == role]
        for slot in of_role[count:]:
            made.remove(slot)
        for _ in range(count - len(of_role)):
            made.append(Slot(_free_name(role, {slot.name for slot in made} | set(busy)), role))
    return _checked(tuple(made))


def with_role(slots: Slots, name: str, role: Role) -> Slots:
    """One instance in another role."""
    _named(slots, [name])
    return _checked(tuple(replace(slot, role=role) if slot.name == name else slot for slot in slots))


def without(slots: Slots, name: str) -> Slots:
    """Without one instance."""
    _named(slots, [name])
    return _checked(tuple(slot for slot in slots if slot.name != name))


def restarted(
    slots: Slots, names: Sequence[str], *, rolling: bool, busy: Collection[str] = (), dead: Collection[str] = ()
) -> Slots:
    """A new life for each of ``names``, or for all when there are none.

    ``rolling``: one at a time, never the last that serves. The only instance of its role is replaced by one of another
    name, which starts first; not where it is ``dead``, as then there is nothing to keep.
    """
    _named(slots, names)
    made = list(slots)
    for at, slot in enumerate(slots):
        if names and slot.name not in names:
            continue
        if rolling and slot.name not in dead and not has_stand_in(slots, slot):
            name = _free_name(slot.role, {one.name for one in made} | set(busy))
            made[at] = Slot(name, slot.role, replaces=slot.name)
        else:
            made[at] = replace(slot, restarts=slot.restarts + 1, rolling=rolling, replaces="")
    return tuple(made)


def check_gpus(slots: Slots, gpus: GpuRecord | None) -> None:
    """BadRequest when there are too few GPUs for all; who is replaced keeps its own until the other serves."""
    if gpus is None:
        return
    needed = sum(gpus.each[slot.role] * (2 if slot.replaces else 1) for slot in slots)
    if needed > gpus.total:
        replaced = [slot.replaces for slot in slots if slot.replaces]
        why = f" ({', '.join(replaced)} can only be replaced where there is room for both)" if replaced else ""
        raise BadRequest(f"{len(slots)} instances need {needed} GPUs{why}, this machine offers {gpus.total}")


def concerned(before: Slots, after: Slots) -> set[str]:
    """Names of the instances that a change is about."""
    return {slot.name for slot in set(before) ^ set(after)}


def pending(
    record: FleetRecord, members: Mapping[str, Member], revision: int, names: Collection[str]
) -> list[str]:  # fmt: skip
    """What is left to do until ``names`` are what they are to be at ``revision``, a sentence each; empty: they are."""
    if record.revision < revision:
        return ["the supervisor has not heard of it yet"]
    known = {each.name: each for each in record.processes if each.kind == "instance" and each.name in names}
    wanted = [slot for slot in record.desired if slot.name in names]
    left = [_unready(slot, known.get(slot.name), members.get(slot.name)) for slot in wanted]
    leaving = known.keys() - {slot.name for slot in wanted}
    return [sentence for sentence in left if sentence] + [f"{name} is {known[name].state}" for name in sorted(leaving)]


def failures(record: FleetRecord, revision: int, names: Collection[str]) -> list[str]:
    """Those of ``names`` that will not become what they are to be by themselves: why, a sentence each."""
    slots = {slot.name: slot for slot in record.desired}
    return [
        f"{each.name} {each.note}"
        for each in record.processes
        if each.name in names and each.name in slots and each.state == "given_up" and record.revision >= revision
        if each.ordered >= slots[each.name].restarts
    ]


def _unready(slot: Slot, each: ProcessRecord | None, member: Member | None) -> str:
    if each is None:
        return f"{slot.name} is not planned yet"
    if each.state != "ready":
        return f"{slot.name} is {each.state}"
    if each.ordered < slot.restarts:
        return f"{slot.name} waits for its restart"
    if member is None or member.state != "ready":
        return f"{slot.name} is not known to be ready"
    return "" if member.role == slot.role else f"{slot.name} is still '{member.role}'"


def has_stand_in(slots: Slots, one: Slot) -> bool:
    """Whether another instance can do what this one does while it is away."""
    alike = ("both", "decode") if one.role == "both" else (one.role, "both")
    return any(slot.role in alike for slot in slots if slot.name != one.name)


def _free_name(role: Role, taken: Collection[str]) -> str:
    return next(name for index in range(2 * limits.INSTANCES_MAX) if (name := f"{role}-{index}") not in taken)


def _named(slots: Slots, names: Iterable[str]) -> None:
    known = [slot.name for slot in slots]
    for name in names:
        if name not in known:
            raise BadRequest(f"the fleet has no instance {name!r}; it has {', '.join(known) or 'none'}")


def _checked(slots: Slots) -> Slots:
    """BadRequest when such a fleet could not serve."""
    made = counts(slots)
    if not slots:
        raise BadRequest("this would leave the fleet without an instance; to end it: vllm-fleet down")
    if not made["decode"] + made["both"]:
        raise BadRequest(
            f"this would leave {made['prefill']} prefill and no decode instance: nobody would take over from them; "
            "keep one 'decode' or 'both'"
        )
    if len(slots) > limits.INSTANCES_MAX:
        raise BadRequest(f"this would be {len(slots)} instances; one fleet has at most {limits.INSTANCES_MAX}")
    return slots
