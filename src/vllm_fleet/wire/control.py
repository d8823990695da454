"""Messages between controller, instances, router, launcher and command line: JSON over HTTP.

| call | body | answer |
| --- | --- | --- |
| POST /v1/members | Register | 200 Registered (the same incarnation again: the same answer) |
| POST /v1/members/NAME/heartbeat | Heartbeat | 200 HeartbeatAck; 409 fenced by another generation; 404 unknown |
| DELETE /v1/members/NAME?generation=G | | 204, also when it is gone already; 409 another generation holds the name |
| POST /v1/members/NAME/drain | Drain | 200 Draining: it gets no new requests; asked again: how busy it is |
| GET /v1/members | | 200 Snapshot |
| GET /v1/desired | | 200 Desired |
| PUT /v1/desired | Desired, with the revision it was made from | 200 Desired, saved; 409 stale: another came first |
| GET /v1/watch?since=REVISION&controller=ID | | 200 WatchEvent lines (NDJSON): changes after REVISION, or a Snapshot |
| GET /metrics | | 200: the connector's counters summed over all instances, as Prometheus text |
| GET /health | | 200 |

All but /health need ``Authorization: Bearer TOKEN``. Errors are ErrorBody with a 4xx or 5xx status. Of several
controllers one leads; the others answer all but /health with 503 ``not_leader``.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from vllm_fleet.core import limits
from vllm_fleet.wire.names import Count, Id, Name, Role, Url
from vllm_fleet.wire.ticket import WorkerAddress

State = Literal["starting", "ready", "suspect", "draining", "gone"]
"""``starting``: does not answer yet. ``suspect``: heartbeats stopped. ``gone``: left, or its lease ended."""

ReportedState = Literal["starting", "ready", "draining"]
"""The states an instance can say of itself."""

Fingerprint = dict[
    Annotated[str, Meta(max_length=limits.NAME_LEN_MAX)], Annotated[str, Meta(max_length=limits.ID_LEN_MAX)]
]
"""What decides whether two instances can exchange KV: model, dtype, block size, versions, … as strings."""

MAY_DIFFER = frozenset({"tensor_parallel"})
"""Keys of a fingerprint, and of a worker's layout, that need not be equal."""

UPSTREAM_CONNECTOR = "connector"
"""Key of a fingerprint that names vLLM's own connector, where an instance runs without ours: it keeps none of our
counters."""

Workers = Annotated[tuple[WorkerAddress, ...], Meta(max_length=64)]
"""Where an instance's workers take fabric connections, in rank order; empty: it cannot be told beforehand."""


class Register(Struct, frozen=True):
    """An instance announces itself."""

    name: Name
    role: Role
    url: Url
    pid: Count
    incarnation: Id
    state: ReportedState = "starting"
    fingerprint: Fingerprint = {}
    workers: Workers = ()


class Registered(Struct, frozen=True):
    """The answer to Register."""

    generation: Count
    revision: Count
    heartbeat_s: float
    lease_s: float


class Load(Struct, frozen=True):
    """How busy an instance's engine is."""

    requests: Count
    """Not finished yet, waiting ones included."""
    held: Count | None = 0
    """Finished ones whose KV waits for a decode instance; None: it cannot be told."""


class Heartbeat(Struct, frozen=True):
    """An instance is alive."""

    generation: Count
    state: ReportedState
    load: Load | None = None


class HeartbeatAck(Struct, frozen=True, omit_defaults=True):
    """The answer to Heartbeat."""

    revision: Count
    heartbeat_s: float | None = None
    """How long to wait for the next one; None: as Registered said."""


class Drain(Struct, frozen=True):
    """This life of an instance is to get no new requests: there is no way back."""

    generation: Count


class Draining(Struct, frozen=True):
    """The answer to Drain: watchers are told. ``load``: from the last heartbeat; None: it said nothing of it."""

    revision: Count
    load: Load | None = None


class Member(Struct, frozen=True):
    """One instance as the controller knows it."""

    name: Name
    role: Role
    url: Url
    pid: Count
    incarnation: Id
    generation: Count
    state: State
    fingerprint: Fingerprint = {}
    workers: Workers = ()


class Slot(Struct, frozen=True):
    """One instance that the fleet is to have. Who has no slot is to leave: drained, stopped, not started again."""

    name: Name
    role: Role
    """What the router uses it for. It may change while the instance runs."""
    restarts: Count = 0
    """How often a restart was asked for: a process that was started for a smaller number is replaced."""
    rolling: bool = False
    """Restarts wait for their turn: one at a time, and never the last ready instance of a role."""
    replaces: Annotated[str, Meta(max_length=limits.NAME_LEN_MAX)] = ""
    """The instance of this name leaves only when this one is ready."""


class Desired(Struct, frozen=True, tag="desired"):
    """What the fleet is to be, instance by instance. Revision 0: nobody has said."""

    revision: Count = 0
    instances: Annotated[tuple[Slot, ...], Meta(max_length=limits.INSTANCES_MAX)] = ()


class Snapshot(Struct, frozen=True, tag="snapshot"):
    """The whole fleet at one revision; ``controller`` names the journal that the revision belongs to."""

    controller: Id
    revision: Count
    members: Annotated[tuple[Member, ...], Meta(max_length=limits.MEMBERS_MAX)]
    desired: Desired = Desired()


class Change(Struct, frozen=True, tag="change"):
    """One member changed; ``state == "gone"`` removes it."""

    revision: Count
    member: Member


class StillHere(Struct, frozen=True, tag="still_here"):
    """Sent while nothing changes, so that a silent connection can be told from a dead one."""

    revision: Count


News = Snapshot | Change | Desired
"""What watchers are told; each with its revision."""

WatchEvent = News | StillHere


class ErrorBody(Struct, frozen=True, omit_defaults=True):
    """What went wrong, in a sentence, and a word for programs. ``leader``: with the code ``not_leader``, the URL of the
    controller that leads, if that is known.
    """

    error: str
    code: str
    leader: str = ""


encode = msgspec.json.Encoder().encode
decode_register = msgspec.json.Decoder(Register).decode
decode_registered = msgspec.json.Decoder(Registered).decode
decode_heartbeat = msgspec.json.Decoder(Heartbeat).decode
decode_heartbeat_ack = msgspec.json.Decoder(HeartbeatAck).decode
decode_drain = msgspec.json.Decoder(Drain).decode
decode_draining = msgspec.json.Decoder(Draining).decode
decode_desired = msgspec.json.Decoder(Desired).decode
decode_snapshot = msgspec.json.Decoder(Snapshot).decode
decode_watch_event = msgspec.json.Decoder(WatchEvent).decode
decode_error = msgspec.json.Decoder(ErrorBody).decode
