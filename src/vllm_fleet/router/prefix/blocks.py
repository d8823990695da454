"""Which instance holds which KV block, from vLLM's KV events. Bounded; pure.

A block is known by vLLM's own hash, which stands for it and all blocks before it: instances of one fleet hash alike
(the launcher sets PYTHONHASHSEED), so the same prefix is the same block here, and no hash is ever computed. Hashes that
do not agree cost hits and nothing else.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence

BlockHash = int | bytes
"""As events carry it: 64 bits of it as a number, or all bytes (VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES=0)."""


class Block:
    """One full block of some prefix. Lives as long as an instance holds it, or a text or a later block refers to it."""

    __slots__ = ("__weakref__", "depth", "holders", "parent")

    def __init__(self, parent: Block | None) -> None:
        self.parent = parent
        self.depth: int = 1 if parent is None else parent.depth + 1
        """Its place in the prefix, from 1."""
        self.holders = 0
        """Mask of instances."""


class BlockIndex:
    """All blocks that instances say they hold. Instances are bits of a mask."""

    def __init__(self, blocks_max: int) -> None:
        self._blocks_max = blocks_max
        self._known: weakref.WeakValueDictionary[BlockHash, Block] = weakref.WeakValueDictionary()
        self._held: dict[int, dict[BlockHash, Block]] = {}
        self._copies: dict[int, Counter[BlockHash]] = {}
        self.overflows = 0
        """Blocks that were not taken in: the index was full."""
        self.orphans = 0
        """Blocks that were not taken in: what comes before them is not known."""

    def __len__(self) -> int:
        return len(self._known)

    def held_by(self, bit: int) -> int:
        """How many blocks an instance holds."""
        return len(self._held.get(bit, ()))

    def stored(self, bit: int, hashes: Sequence[BlockHash], before: BlockHash | None) -> Block | None:
        """An instance holds these blocks, which follow ``before``; the last of them, None when they have no place here.

        vLLM may hold one block twice (two requests computed it at once), and tells each copy's end.
        """
        parent: Block | None = None
        if before is not None:
            parent = self._known.get(before)
            if parent is None:
                self.orphans += len(hashes)
                return None
        held, copies = self._held.setdefault(bit, {}), self._copies.setdefault(bit, Counter())
        for hash_ in hashes:
            block = self._known.get(hash_)
            if block is None:
                if len(self._known) >= self._blocks_max:
                    self.overflows += 1
                    return None
                block = self._known[hash_] = Block(parent)
            if hash_ in held:
                copies[hash_] += 1
            else:
                held[hash_] = block
                block.holders |= bit
            parent = block
        return parent

    def removed(self, bit: int, hashes: Sequence[BlockHash]) -> None:
        """An instance gave up these blocks; unknown ones are ignored."""
        held, copies = self._held.get(bit), self._copies.get(bit)
        if held is None or copies is None:
            return
        for hash_ in hashes:
            if copies.get(hash_):
                copies[hash_] -= 1
                if not copies[hash_]:
                    del copies[hash_]
                continue
            block = held.pop(hash_, None)
            if block is not None:
                block.holders &= ~bit

    def clear(self, bit: int) -> None:
        """The instance holds nothing that is known: its cache was reset, or events were lost."""
        for block in self._held.pop(bit, {}).values():
            block.holders &= ~bit
        self._copies.pop(bit, None)


def held(tail: Block, blocks: int, wanted: int) -> dict[int, int]:
    """For bits of ``wanted``: how many of the first ``blocks`` blocks up to ``tail`` are held without a gap, if any."""
    node: Block | None = tail
    while node is not None and node.depth > blocks:
        node = node.parent
    masks: list[int] = []
    while node is not None:
        masks.append(node.holders)
        node = node.parent
    found: dict[int, int] = {}
    depth, left = 0, wanted
    for mask in reversed(masks):
        still = left & mask
        if still != left:
            _lost(found, left ^ still, depth)
            left = still
            if not left:
                return found
        depth += 1
    _lost(found, left, depth)
    return found


def _lost(found: dict[int, int], mask: int, depth: int) -> None:
    while mask and depth:
        bit = mask & -mask
        found[bit] = depth
        mask ^= bit
