"""vLLM's KV events, decoded, and the order they come in. Pure.

From vllm/distributed/kv_events.py: a message is (topic, sequence number as 8 bytes big-endian, msgpack). Only what
routing needs is decoded: token ids, most of the bytes, are skipped unread.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import Struct

from vllm_fleet.core.errors import Corrupt
from vllm_fleet.router.prefix.blocks import BlockHash


class BlockStored(Struct, frozen=True, tag="BlockStored"):
    """Blocks that can be hit from now on."""

    block_hashes: list[BlockHash]
    parent_block_hash: BlockHash | None
    block_size: int
    group_idx: int | None = None
    session_id: str | None = None
    """X-Session-ID of the request that stored them: the router's own label. vLLM 0.32 and later."""


class BlockRemoved(Struct, frozen=True, tag="BlockRemoved"):
    """Blocks that were evicted."""

    block_hashes: list[BlockHash]
    group_idx: int | None = None


class AllBlocksCleared(Struct, frozen=True, tag="AllBlocksCleared"):
    """The prefix cache was reset."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class _Batch(Struct, frozen=True, array_like=True):
    ts: float
    events: list[Event]
    data_parallel_rank: int | None = None


_decode = msgspec.msgpack.Decoder(_Batch).decode
SEQUENCE_BYTES = 8
END = (-1).to_bytes(SEQUENCE_BYTES, "big", signed=True)
"""The sequence number that ends a replay."""


def parse(payload: bytes) -> list[Event]:
    """The events of one message.

    Raises:
        Corrupt: it is none.
    """
    try:
        return _decode(payload).events
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Corrupt(f"no KV events: {len(payload)} bytes, {str(error)[:100]}") from None


def parse_sequence(frame: bytes) -> int:
    """A message's number.

    Raises:
        Corrupt: it is not 8 bytes long.
    """
    if len(frame) != SEQUENCE_BYTES:
        raise Corrupt(f"a sequence number of {len(frame)} bytes, expected {SEQUENCE_BYTES}")
    return int.from_bytes(frame, "big")


Verdict = Literal["next", "old", "gap"]


class Sequence:
    """Where one publisher's stream stands. Numbers begin at 0 with each life of an instance."""

    def __init__(self) -> None:
        self.expected = 0

    def judge(self, number: int) -> Verdict:
        """Whether a message is the one expected, was taken before, or comes after lost ones. Changes nothing."""
        if number == self.expected:
            return "next"
        return "old" if number < self.expected else "gap"

    def took(self, number: int) -> None:
        """Messages up to ``number`` are taken, or given up."""
        self.expected = number + 1
