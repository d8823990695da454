"""A prefix cache that behaves like one vLLM instance's, with its KV events; for benchmarks of routing. Pure.

Like vLLM's block pool (vllm/v1/core/block_pool.py): full blocks only, hashed with all that comes before them; blocks of
running requests stay; free ones are evicted in the order of their last use, the end of a prompt before its beginning.
The last token of a prompt is always computed, so a prompt that is cached in full hits all blocks but the last.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import Any

import xxhash


def block_hashes(tokens: bytes, block_bytes: int) -> list[int]:
    """The hash of each full block of ``tokens``."""
    found: list[int] = []
    before = b""
    for start in range(0, len(tokens) - block_bytes + 1, block_bytes):
        number = xxhash.xxh3_64_intdigest(before + tokens[start : start + block_bytes])
        found.append(number)
        before = number.to_bytes(8, "big")
    return found


@dataclass
class Held:
    """A running request."""

    hashes: list[int]
    """Blocks it holds, from the first."""
    hit: int
    """Blocks of its prompt that were cached."""
    label: str | None


class MockCache:
    """One instance's. Tokens are runs of ``token_bytes`` bytes."""

    def __init__(self, blocks: int, block_tokens: int, token_bytes: int = 4) -> None:
        self.blocks, self.block_tokens, self.token_bytes = blocks, block_tokens, token_bytes
        self._block_bytes = block_tokens * token_bytes
        self._cached: OrderedDict[int, None] = OrderedDict()  # free ones, the next to be evicted first
        self._pinned: Counter[int] = Counter()
        self.events: list[dict[str, Any]] = []
        """What happened since somebody emptied this list; as vLLM encodes it."""

    def begin(self, prompt: bytes, label: str | None = None) -> Held:
        """Start a request: what is cached is used, the rest gets blocks."""
        hashes = block_hashes(prompt, self._block_bytes)
        usable = hashes[:-1] if len(prompt) % self._block_bytes < self.token_bytes else hashes
        hit = next((at for at, one in enumerate(usable) if not self.has(one)), len(usable))
        held = Held([], hit, label)
        for one in hashes[:hit]:
            self._pin(held, one)
        self._store(held, hashes)
        return held

    def grow(self, held: Held, text: bytes) -> None:
        """The request's prompt and answer so far."""
        self._store(held, block_hashes(text, self._block_bytes))

    def end(self, held: Held) -> None:
        """The request is over: its blocks may be evicted, the last first."""
        for one in reversed(held.hashes):
            self._pinned[one] -= 1
            if not self._pinned[one]:
                del self._pinned[one]
                self._cached[one] = None

    def has(self, one: int) -> bool:
        """Whether a block is cached."""
        return one in self._cached or one in self._pinned

    def clear(self) -> None:
        """Forget everything; nothing must run."""
        assert not self._pinned, "a request runs"
        self._cached.clear()
        self.events.append({"type": "AllBlocksCleared"})

    @property
    def used(self) -> float:
        """The share of blocks that running requests hold."""
        return len(self._pinned) / self.blocks

    def _pin(self, held: Held, one: int) -> None:
        self._cached.pop(one, None)
        self._pinned[one] += 1
        held.hashes.append(one)

    def _store(self, held: Held, hashes: list[int]) -> None:
        start = len(held.hashes)
        new = []
        for one in hashes[start:]:
            if not self.has(one):
                if len(self._cached) + len(self._pinned) >= self.blocks and not self._evict():
                    break  # all blocks are in use: vLLM would wait; here the rest goes uncached
                new.append(one)
            self._pin(held, one)
        if new:
            first = held.hashes.index(new[0])
            self.events.append(
                {
                    "type": "BlockStored",
                    "block_hashes": new,
                    "parent_block_hash": held.hashes[first - 1] if first else None,
                    "token_ids": [0] * (len(new) * self.block_tokens),
                    "block_size": self.block_tokens,
                    "lora_id": None,
                    "medium": "GPU",
                    "lora_name": None,
                    "group_idx": 0,
                    "session_id": held.label,
                }
            )

    def _evict(self) -> bool:
        if not self._cached:
            return False
        one, _ = self._cached.popitem(last=False)
        self.events.append({"type": "BlockRemoved", "block_hashes": [one], "medium": "GPU", "group_idx": 0})
        return True
