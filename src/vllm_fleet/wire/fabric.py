"""Messages between workers on an authenticated fabric connection: msgpack in frames.

| question | answer |
| --- | --- |
| Describe | Description |
| Follow(follower) | Following; from then on the owner sends Progress by itself over this connection |
| Open(transfer, prompt, follower) | Opened with the block ids held for it so far, or Denied |
| Close(transfer) | Closed(valid): whether the blocks were held all the time since Open |
| Read(grant, runs) | Reading(nbytes), exactly that many raw bytes, then Moved; or Denied |
| Write(grant, runs) | Writing(nbytes); the asker sends exactly that many raw bytes; then Moved. Or Denied |
| Digest(grant, runs) | Digests, one 64-bit checksum for each run; or Denied |
| NcclJoin(pair, epoch, unique id) | NcclJoined on agreeing, again when in the communicator; or Denied |
| NcclPing(pattern) | Reading(nbytes), the pattern through NCCL both ways, then Moved; or Denied |
| NcclRead(grant, runs, more) | Reading(nbytes), the bytes through NCCL; after the last one Moved. Or Denied |
| NcclWrite(grant, runs, more) | Writing(nbytes); the asker sends through NCCL; after the last one Moved. Or Denied |
| NixlCheck, MooncakeCheck(grant, runs) | Probed, if the asker may move these runs by itself; or Denied |
| NixlJoin(handle) | Probed, when the owner has written its nonce into the asker's memory; or Denied |
| NixlPush(grant, runs, targets) | Moved, when the owner has written the runs into the asker's pool; or Denied |
| Map(pool) | Mapped: the asker maps that registration until one side closes the connection; or Denied |
| Permit(grant, runs) | Permitted: the asker may write the runs of a registration that it maps; or Denied |
| Trace(prefixes) | Traced: what became of a request's handoffs on this worker |
| Probe(pool) | Probed, if that registration stands; or Denied |
| Ping | Pong |

Peers name a registered region and an offset inside it, never an address.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from vllm_fleet.core import limits
from vllm_fleet.wire import handoff
from vllm_fleet.wire.names import Count, Id

Close = handoff.Close
Closed = handoff.Closed
Follow = handoff.Follow
Following = handoff.Following
Open = handoff.Open
Opened = handoff.Opened
Progress = handoff.Progress
Trace = handoff.Trace
Traced = handoff.Traced
Update = handoff.Update

RUN_BYTES = 24
"""Encoded size of one run of a Read."""

DIGEST_BYTES = 8
"""Encoded size of one run's checksum."""

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


class Shape(Struct, frozen=True):
    """How a region is cut into blocks."""

    block_bytes: Count
    block_stride: Count
    blocks: Count


class Description(Struct, frozen=True, tag="description"):
    engine: Id
    rank: Count
    ranks: Count
    layout: dict[Annotated[str, Meta(max_length=limits.NAME_LEN_MAX)], Fact]
    """What must be equal on both sides for blocks to mean the same: dtype, block size, heads, …"""
    shapes: Annotated[tuple[Shape, ...], Meta(max_length=limits.REGIONS_MAX)]
    """One per region."""
    handles: Annotated[tuple[PoolHandle, ...], Meta(max_length=16)]
    """In the owner's order of preference."""


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
    algorithm: Annotated[str, Meta(max_length=limits.NAME_LEN_MAX)] = "xxh3"


class Digests(Struct, frozen=True, tag="digests"):
    sums: Annotated[bytes, Meta(max_length=DIGEST_BYTES * limits.RUNS_MAX)]
    """Little-endian uint64, one for each run."""


class NcclJoin(Struct, frozen=True, tag="nccl_join"):
    """Let us meet in a communicator of two: the asker is rank 0, the owner rank 1."""

    pair: Id
    """Random id of the asker's link."""
    epoch: Annotated[int, Meta(ge=1, le=2**40)]
    """Counts the communicators of this pair: a later one ends the earlier."""
    pool: Id
    unique_id: Annotated[bytes, Meta(min_length=1, max_length=limits.NCCL_ID_BYTES_MAX)]
    chunk_bytes: Annotated[int, Meta(ge=1, le=limits.NCCL_STAGING_BYTES_MAX)]
    """Transfers are cut into messages of this size."""
    ctas: Annotated[int, Meta(ge=1, le=limits.NCCL_CTAS_MAX)]
    """Most blocks of threads of NCCL's kernel; NCCL needs the same number on both sides."""


class NcclJoined(Struct, frozen=True, tag="nccl_joined"):
    epoch: Count


class NcclPing(Struct, frozen=True, tag="nccl_ping"):
    pattern: Annotated[bytes, Meta(min_length=1, max_length=limits.NCCL_PING_BYTES_MAX)]


class NcclRead(Struct, frozen=True, tag="nccl_read"):
    grant: Id
    pool: Id
    runs: Annotated[bytes, Meta(min_length=RUN_BYTES, max_length=RUN_BYTES * limits.RUNS_MAX)]
    """As in Read."""
    more: bool
    """Whether another question of the same transfer follows."""


class NcclWrite(Struct, frozen=True, tag="nccl_write"):
    grant: Id
    pool: Id
    runs: Annotated[bytes, Meta(min_length=RUN_BYTES, max_length=RUN_BYTES * limits.RUNS_MAX)]
    """As in Read, of the answering side's pool."""
    more: bool


class NixlCheck(Struct, frozen=True, tag="nixl_check"):
    """May I move these runs? Asked before a library moves them without the owner's help."""

    grant: Id
    pool: Id
    write: bool
    runs: Annotated[bytes, Meta(min_length=RUN_BYTES, max_length=RUN_BYTES * limits.RUNS_MAX)]
    """As in Read, of the answering side's pool."""


class MooncakeCheck(NixlCheck, frozen=True, tag="mooncake_check"):
    pass


class NixlJoin(Struct, frozen=True, tag="nixl_join"):
    """Here is where you shall write to; takes the place of what this connection joined with before."""

    pool: Id
    handle: PoolHandle
    """The asker's own pool."""


class NixlPush(Struct, frozen=True, tag="nixl_push"):
    grant: Id
    pool: Id
    runs: Annotated[bytes, Meta(min_length=RUN_BYTES, max_length=RUN_BYTES * limits.RUNS_MAX)]
    """As in Read."""
    targets: Annotated[bytes, Meta(min_length=8, max_length=8 * limits.RUNS_MAX)]
    """Little-endian int64, one for each run: the offset in the same region of the asker's pool."""


class Map(Struct, frozen=True, tag="map"):
    pool: Id


class Mapped(Struct, frozen=True, tag="mapped"):
    pool: Id


class Permit(Struct, frozen=True, tag="permit"):
    grant: Id
    pool: Id
    runs: Annotated[bytes, Meta(min_length=RUN_BYTES, max_length=RUN_BYTES * limits.RUNS_MAX)]
    """As in Read, of the answering side's pool."""


class Permitted(Struct, frozen=True, tag="permitted"):
    nbytes: Count


class Probe(Struct, frozen=True, tag="probe"):
    pool: Id


class Probed(Struct, frozen=True, tag="probed"):
    pool: Id
    """The registration asked for, which stands."""


class Ping(Struct, frozen=True, tag="ping"):
    pass


class Pong(Struct, frozen=True, tag="pong"):
    pass


Refusal = Literal[
    "unknown_transfer", "other_prompt", "already_open", "not_granted", "out_of_range", "stale_pool", "unsupported"
]


class Denied(Struct, frozen=True, tag="denied"):
    """The owner will not do it; the connection stays usable."""

    reason: Refusal
    detail: Annotated[str, Meta(max_length=limits.ID_LEN_MAX)] = ""


Question = (
    NixlCheck
    | MooncakeCheck
    | NixlJoin
    | NixlPush
    | Describe
    | Follow
    | Trace
    | Open
    | Close
    | Read
    | Write
    | Digest
    | NcclJoin
    | NcclPing
    | NcclRead
    | NcclWrite
    | Map
    | Permit
    | Probe
    | Ping
)
Answer = (
    Description
    | Following
    | Progress
    | Traced
    | Opened
    | Closed
    | Reading
    | Writing
    | Moved
    | Digests
    | NcclJoined
    | Mapped
    | Permitted
    | Probed
    | Pong
    | Denied
)

encode = msgspec.msgpack.Encoder().encode
decode_question = msgspec.msgpack.Decoder(Question).decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode
