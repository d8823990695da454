"""What a decision asks the world to do, in the order of the list."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_fleet.controller.state import Entry
from vllm_fleet.wire.control import Change, Desired, Draining, ErrorBody, HeartbeatAck, Registered, Snapshot


@dataclass(frozen=True)
class Persist:
    """Save this change, then make it. ``required``: the answer promises that it is saved, so without saving it is not
    made; other changes are made in memory when the disk fails.
    """

    entry: Entry
    required: bool = False


@dataclass(frozen=True)
class Broadcast:
    """Tell every watcher about one change."""

    change: Change | Desired


@dataclass(frozen=True)
class Announce:
    """Give every watcher the whole fleet: its history has another name now."""

    snapshot: Snapshot


@dataclass(frozen=True)
class Save:
    """Write the journal anew: it failed before and may work again."""


@dataclass(frozen=True)
class Reply:
    """Answer the caller."""

    status: int
    body: Registered | HeartbeatAck | Draining | Desired | ErrorBody | None = None


Effect = Persist | Broadcast | Announce | Save | Reply


def refuse(status: int, code: str, error: str) -> Reply:
    """A typed refusal."""
    return Reply(status, ErrorBody(error, code))
