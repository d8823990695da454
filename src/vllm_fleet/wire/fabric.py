"""Messages between workers on an authenticated fabric connection: msgpack in frames.

| question | answer |
| --- | --- |
| Describe | Description |
| Open(transfer) | Opened with the block ids held for it, or Denied |
| Close(transfer) | Closed(valid): whether the blocks were held all the time since Open |
| Read(grant, runs) | Reading(nbytes), exactly that many raw bytes, then Moved; or Denied |
| Write(grant, runs) | Writing(nbytes); the asker sends exactly that many raw bytes; then Moved. Or Denied |
| Digest(grant, runs) | Digests, one 64-bit checksum for each run; or Denied |
| Probe(pool) | Probed, if that registration stands; or Denied |
| Ping | Pong |

Peers name a registered region and an offset inside it, never an address.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from vllm_fleet.core import limits
from vllm_fleet.wire.names import Count, Id

RUN_BYTES = 24
"""Encoded size of one run of a Read."""

DIGEST_BYTES = 8
"""Encoded size of one run's checksum."""

BlockId = Annotated[int, Meta(ge=0, le=2**40)]
Fact = Annotated[str, Meta(max_length=limits.ID_LEN_MAX)]


class PoolHandle(Struct, frozen=True):
    """What a peer needs to reach one registered pool through one transport."""

    transport: Annotated[str, Meta(max_length=limits.NAME_LEN_MAX)]
    pool: Id
    """Random id of this registration: memory registered again has another."""
    region_bytes: Annotated[tuple[Count, ...], Meta(max_length=limits.REGIONS_MAX)]
    details: Annotated[bytes, Meta(max_length=64 << 10)] = b""
    """The transport's own part, read by the transport only."""


class Describe(Struct, frozen=True, tag="describe"):
    pass


class Description(Struct, frozen=True, tag="description"):
    engine: Id
    rank: Count
    ranks: Count
    layout: dict[Annotated[str, Meta(max_length=limits.NAME_LEN_MAX)], Fact]
    """What must be equal on both sides for blocks to mean the same: dtype, block size, heads, …"""
    handles: Annotated[tuple[PoolHandle, ...], Meta(max_length=16)]
    """In the owner's order of preference."""


class Open(Struct, frozen=True, tag="open"):
    transfer: Id


class Opened(Struct, frozen=True, tag="opened"):
    blocks: Annotated[tuple[BlockId, ...], Meta(max_length=limits.BLOCKS_MAX)]


class Close(Struct, frozen=True, tag="close"):
    transfer: Id
    taken: bool
    """False when the reader gave up; for the owner's counters."""


class Closed(Struct, frozen=True, tag="closed"):
    valid: bool


class Read(Struct, frozen=True, tag="read"):
    grant: Id
    """The open transfer on whose behalf the runs are read."""
    pool: Id
    runs: Annotated[bytes, Meta(min_length=RUN_BYTES, max_length=RUN_BYTES * limits.RUNS_MAX)]
    """Little-endian int64 triples: region index, offset in bytes, length in bytes."""


class Reading(Struct, frozen=True, tag="reading"):
    nbytes: Count


class Write(Struct, frozen=True, tag="write"):
    grant: Id
    pool: Id
    runs: Annotated[bytes, Meta(min_length=RUN_BYTES, max_length=RUN_BYTES * limits.RUNS_MAX)]
    """As in Read, of the answering side's pool."""


class Writing(Struct, frozen=True, tag="writing"):
    """The owner takes this many bytes now."""

    nbytes: Count


class Moved(Struct, frozen=True, tag="moved"):
    """All bytes were sent or taken, and the owner's registration stood all the time."""

    nbytes: Count


class Digest(Struct, frozen=True, tag="digest"):
    grant: Id
    pool: Id
    runs: Annotated[bytes, Meta(min_length=RUN_BYTES, max_length=RUN_BYTES * limits.RUNS_MAX)]
    """As in Read."""


class Digests(Struct, frozen=True, tag="digests"):
    sums: Annotated[bytes, Meta(max_length=DIGEST_BYTES * limits.RUNS_MAX)]
    """Little-endian uint64, one for each run."""


class Probe(Struct, frozen=True, tag="probe"):
    pool: Id


class Probed(Struct, frozen=True, tag="probed"):
    pool: Id
    """The registration asked for, which stands."""


class Ping(Struct, frozen=True, tag="ping"):
    pass


class Pong(Struct, frozen=True, tag="pong"):
    pass


class Denied(Struct, frozen=True, tag="denied"):
    """The owner will not do it; the connection stays usable."""

    reason: Literal["unknown_transfer", "already_open", "not_granted", "out_of_range", "stale_pool", "unsupported"]
    detail: Annotated[str, Meta(max_length=limits.ID_LEN_MAX)] = ""


Question = Describe | Open | Close | Read | Write | Digest | Probe | Ping
Answer = Description | Opened | Closed | Reading | Writing | Moved | Digests | Probed | Pong | Denied

encode = msgspec.msgpack.Encoder().encode
decode_question = msgspec.msgpack.Decoder(Question).decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode
