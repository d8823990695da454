"""Questions about handoffs, from decode workers to a prefill worker's endpoint; part of wire/fabric.py's unions.

A decode worker follows an owner over one connection (Follow, then Progress comes by itself) and opens and closes
transfers over another, in the name under which it follows.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from vllm_fleet.core import limits
from vllm_fleet.wire.names import Count, Id

BlockId = Annotated[int, Meta(ge=0, le=2**40)]

Digest32 = Annotated[bytes, Meta(min_length=32, max_length=32)]
Rank = Annotated[int, Meta(ge=0, lt=limits.RANKS_MAX)]


class Follow(Struct, frozen=True, tag="follow"):
    """Tell me over this connection how the transfers get on that are opened in this name."""

    follower: Id


class Following(Struct, frozen=True, tag="following"):
    pass


class Open(Struct, frozen=True, tag="open"):
    transfer: Id
    prompt: Digest32
    """Digest of the prompt whose KV is wanted (wire.ticket.prompt_digest)."""
    follower: Id
    """Who is told how it gets on; a transfer that has not begun yet is expected then."""
    reader: Rank = 0
    """Which of ``readers`` workers the asker is: all that take KV from this owner for this transfer."""
    readers: Annotated[int, Meta(ge=1, le=limits.RANKS_MAX)] = 1


class Opened(Struct, frozen=True, tag="opened"):
    blocks: Annotated[tuple[BlockId, ...], Meta(max_length=limits.BLOCKS_MAX)]
    """Those known so far; in the order of the prompt."""
    ready: Count
    """Tokens whose KV is in the blocks."""


class Update(Struct, frozen=True):
    """What has become of one transfer."""

    transfer: Id
    first: Count
    """Where ``blocks`` go on: so many were told before."""
    blocks: Annotated[tuple[BlockId, ...], Meta(max_length=limits.BLOCKS_MAX)]
    ready: Count
    gone: bool = False
    """Its blocks are not held any more: whatever was read of them is to be thrown away."""


class Progress(Struct, frozen=True, tag="progress"):
    updates: Annotated[tuple[Update, ...], Meta(max_length=limits.PINS_MAX)]


class Trace(Struct, frozen=True, tag="trace"):
    """What became of a request's handoffs?"""

    prefixes: Annotated[tuple[Id, ...], Meta(min_length=1, max_length=8)]
    """Beginnings of vLLM's names for it: the engine adds to the name that a client gave."""


TraceKind = Literal["hold", "load"]


class TracePart(Struct, frozen=True):
    """What one prefill worker gave to a load."""

    peer: Annotated[str, Meta(max_length=limits.ID_LEN_MAX)]
    transport: Annotated[str, Meta(max_length=limits.NAME_LEN_MAX)]
    nbytes: Count
    copies: Count
    copy_s: float
    error: str


class TraceRecord(Struct, frozen=True):
    """One handoff, seen from one worker. Times are in seconds."""

    request: Annotated[str, Meta(max_length=limits.ID_LEN_MAX)]
    kind: TraceKind
    outcome: str
    ago_s: float
    """Since it began on this worker."""
    queued_s: float
    """From its arrival at the instance until it began."""
    ready_s: float
    """From its beginning until all KV was computed (hold), or was ready to be copied (load)."""
    whole_s: float
    """From its beginning to its end."""
    tokens: Count
    blocks: Count
    parts: Annotated[tuple[TracePart, ...], Meta(max_length=limits.RANKS_MAX)]


class Traced(Struct, frozen=True, tag="traced"):
    records: Annotated[tuple[TraceRecord, ...], Meta(max_length=limits.TRACE_RECORDS_MAX)]


class Close(Struct, frozen=True, tag="close"):
    transfer: Id
    taken: bool
    """False when the reader gave up."""
    reader: Rank = 0


class Closed(Struct, frozen=True, tag="closed"):
    valid: bool
