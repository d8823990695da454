"""Messages between controller, instances, router, launcher and command line: JSON over HTTP.

| call | body | answer |
| --- | --- | --- |
| POST /v1/members | Register | 200 Registered (the same incarnation again: the same answer) |
| POST /v1/members/NAME/heartbeat | Heartbeat | 200 HeartbeatAck; 409 fenced by another generation; 404 unknown |
| DELETE /v1/members/NAME?generation=G | | 204, also when it is gone already; 409 another generation holds the name |
| GET /v1/members | | 200 Snapshot |
| GET /v1/watch?since=REVISION&controller=ID | | 200 WatchEvent lines (NDJSON): changes after REVISION, or a Snapshot |
| GET /metrics | | 200: the connector's counters summed over all instances, as Prometheus text |
| GET /health | | 200 |

All but /health need ``Authorization: Bearer TOKEN``. Errors are ErrorBody with a 4xx or 5xx status.
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


class Heartbeat(Struct, frozen=True):
    """An instance is alive."""

    generation: Count
    state: ReportedState


class HeartbeatAck(Struct, frozen=True):
    """The answer to Heartbeat."""

    revision: Count


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


class Snapshot(Struct, frozen=True, tag="snapshot"):
    """The whole fleet at one revision; ``controller`` names the journal that the revision belongs to."""

    controller: Id
    revision: Count
    members: Annotated[tuple[Member, ...], Meta(max_length=limits.MEMBERS_MAX)]


class Change(Struct, frozen=True, tag="change"):
    """One member changed; ``state == "gone"`` removes it."""

    revision: Count
    member: Member


class StillHere(Struct, frozen=True, tag="still_here"):
    """Sent while nothing changes, so that a silent connection can be told from a dead one."""

    revision: Count


WatchEvent = Snapshot | Change | StillHere


class ErrorBody(Struct, frozen=True):
    """What went wrong, in a sentence, and a word for programs."""

    error: str
    code: str


encode = msgspec.json.Encoder().encode
decode_register = msgspec.json.Decoder(Register).decode
decode_registered = msgspec.json.Decoder(Registered).decode
decode_heartbeat = msgspec.json.Decoder(Heartbeat).decode
decode_heartbeat_ack = msgspec.json.Decoder(HeartbeatAck).decode
decode_snapshot = msgspec.json.Decoder(Snapshot).decode
decode_watch_event = msgspec.json.Decoder(WatchEvent).decode
decode_error = msgspec.json.Decoder(ErrorBody).decode
