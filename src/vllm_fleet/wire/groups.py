"""Messages between workers that communicate as groups and the controller, which brings them together: JSON over HTTP.

| call | body | answer |
| --- | --- | --- |
| POST /v1/groups/NAME/meet | Meet | 200 MeetAnswer; waits for the others, for ``wait_s`` at most |
| POST /v1/groups/NAME/id | GiveId | 200 Come: rank 0 hands in the id that it made |
| POST /v1/groups/NAME/joined | Joined | 200 Progress: this member is in |
| POST /v1/groups/NAME/hold | Hold | 200 Progress, when the epoch is no more as known, at the latest after ``wait_s`` |
| POST /v1/groups/NAME/failed | Failed | 204: the epoch has ended |
| POST /v1/groups/NAME/leave | Leave | 204 |
| GET /v1/groups/NAME | | 200 GroupStatus |
| GET /v1/groups | | 200 GroupList |

409 ``stale``: the epoch is not the group's present one; nothing was changed. 409 ``replaced`` or ``left``: this life of
the member cannot come back. All are safe to repeat. docs/groups.md has the protocol.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from vllm_fleet.core import limits
from vllm_fleet.wire.names import Count, Id, Name

Names = Annotated[tuple[Name, ...], Meta(min_length=1, max_length=limits.GROUP_MEMBERS_MAX)]
SomeNames = Annotated[tuple[Name, ...], Meta(max_length=limits.GROUP_MEMBERS_MAX)]
GroupId = Annotated[bytes, Meta(min_length=1, max_length=limits.GROUP_ID_BYTES_MAX)]
Number = Annotated[int, Meta(ge=0, le=limits.GROUP_EPOCH_MAX)]
WaitSeconds = Annotated[float, Meta(ge=0, le=limits.GROUP_WAIT_S_MAX)]
Reason = Annotated[str, Meta(max_length=limits.GROUP_REASON_LEN_MAX)]
EpochState = Literal["open", "formed", "ended"]
"""``open``: its members are joining. ``formed``: all have said that they are in."""


class Attendee(Struct, frozen=True):
    """One life of one worker. With ``instance``, it is lost when that life of the instance is."""

    name: Name
    life: Id
    instance: Annotated[str, Meta(max_length=limits.NAME_LEN_MAX)] = ""
    generation: Count = 0


class Terms(Struct, frozen=True):
    """What a member asks of its group; where members differ, all their names and the largest numbers count."""

    members: Names
    """Who is to be in it, the member itself included."""
    least: Annotated[int, Meta(ge=1, le=limits.GROUP_MEMBERS_MAX)] = 2
    """An epoch has at least so many members."""
    gather_s: Annotated[float, Meta(ge=0, le=limits.GROUP_GATHER_S_MAX)] = 2.0
    """So long after the last arrival an epoch opens without those who are still awaited."""
    form_s: Annotated[float, Meta(gt=0, le=limits.GROUP_FORM_S_MAX)] = 10.0
    """An epoch that has not formed so long after it opened ends."""


class EpochId(Struct, frozen=True):
    """One epoch. ``run``: which run of which controller opened it; numbers grow within it, and over restarts as far as
    a member lives to tell.
    """

    run: Id
    number: Number


class Meet(Struct, frozen=True):
    """A member is here for an epoch later than ``after``, the last one that it had a part in."""

    who: Attendee
    terms: Terms
    after: Number = 0
    wait_s: WaitSeconds = 0.0


class Waiting(Struct, frozen=True, tag="waiting"):
    """Others are awaited: ask again. ``ended``: why there is no epoch any more."""

    missing: SomeNames = ()
    ended: str = ""


class Create(Struct, frozen=True, tag="create"):
    """An epoch is open and the member that is told this has rank 0: it is to make the id. ``ranks``: names by rank."""

    epoch: EpochId
    ranks: Names


class Come(Struct, frozen=True, tag="come"):
    """An epoch is open: join under this id."""

    epoch: EpochId
    ranks: Names
    group_id: GroupId


MeetAnswer = Waiting | Create | Come


class GiveId(Struct, frozen=True):
    """The id that rank 0 made for an epoch. Another one for the same epoch is refused: 409 ``id_given``."""

    who: Attendee
    epoch: EpochId
    group_id: GroupId


class Joined(Struct, frozen=True):
    """A member's communicator stands."""

    who: Attendee
    epoch: EpochId


class Hold(Struct, frozen=True):
    """A member is in this epoch and wants to know as soon as it is no more as ``known``.

    A controller that was restarted takes a formed epoch over from what its members say here.
    """

    who: Attendee
    terms: Terms
    epoch: EpochId
    ranks: Names
    known: Literal["open", "formed"] = "open"
    wait_s: WaitSeconds = 0.0


class Progress(Struct, frozen=True):
    """How an epoch stands. ``missing``: who has not joined; ``reason``: why it ended."""

    state: EpochState
    missing: SomeNames = ()
    reason: str = ""


class Failed(Struct, frozen=True):
    """A member's communicator failed, maybe through ``blamed``: the next epoch does not wait for them."""

    who: Attendee
    epoch: EpochId
    reason: Reason = ""
    blamed: SomeNames = ()


class Leave(Struct, frozen=True):
    """This life of a member goes for good."""

    who: Attendee


class GroupStatus(Struct, frozen=True):
    """A group. ``here``: who waits for the next epoch; ``awaited``: for whom; ``missing``: who has not joined."""

    name: Name
    state: Literal["gathering", "open", "formed"]
    epoch: EpochId
    ranks: SomeNames = ()
    missing: SomeNames = ()
    here: SomeNames = ()
    awaited: SomeNames = ()
    reason: str = ""
    """Why the last epoch that ended did."""


class GroupList(Struct, frozen=True):
    """All groups of the fleet."""

    groups: Annotated[tuple[GroupStatus, ...], Meta(max_length=limits.GROUPS_MAX)]


encode = msgspec.json.Encoder().encode
decode_meet_answer: Callable[[bytes], MeetAnswer] = msgspec.json.Decoder(MeetAnswer).decode
decode_come = msgspec.json.Decoder(Come).decode
decode_progress = msgspec.json.Decoder(Progress).decode
decode_status = msgspec.json.Decoder(GroupStatus).decode
decode_list = msgspec.json.Decoder(GroupList).decode
