"""A radix tree over recent prompts: which instance was sent which text. Bounded; pure.

Edges are runs of bytes, compared by memcmp: matching a prompt of 16 KiB costs a few microseconds, whatever its length
in tokens. Each instance has its own order of use, so that its part can be kept as large as its KV cache is, and what it
would have evicted is forgotten (leaves first, as vLLM does).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

from vllm_fleet.router.prefix.blocks import Block


class Leaf:
    """A node of the tree. Identity matters: the node at the end of a text stays the same object when edges split."""

    __slots__ = ("blocks", "children", "edge", "end", "holders", "parent", "tail")

    def __init__(self, parent: Leaf | None, edge: bytes, end: int, holders: int) -> None:
        self.parent, self.edge, self.end, self.holders = parent, edge, end, holders
        self.children: dict[int, Leaf] = {}
        self.tail: Block | None = None
        """The last block that is known to belong to this text; of a text that ends here, or goes on from here."""
        self.blocks = 0
        """How many blocks the text up to here has, about."""


class Match(NamedTuple):
    """How far a text is known."""

    path: list[Leaf]
    """From the top; the last one may be matched in part."""
    end: int
    """Bytes in common."""


class PromptTree:
    """Texts by space. Instances are bits of a mask, given and taken back by the owner."""

    def __init__(self, bytes_max: int, nodes_max: int) -> None:
        self._bytes_max, self._nodes_max = bytes_max, nodes_max
        self._tops: dict[bytes, Leaf] = {}
        self._recent: OrderedDict[Leaf, None] = OrderedDict()  # a node is never more recent than its parent
        self._own: dict[int, OrderedDict[Leaf, None]] = {}
        self._own_bytes: dict[int, int] = {}
        self._own_bytes_max: dict[int, int] = {}
        self._spaces: dict[Leaf, bytes] = {}
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._recent)

    def match(self, space: bytes, text: bytes) -> Match:
        """The longest beginning of ``text`` that is in the tree. Changes nothing."""
        path: list[Leaf] = []
        node, at = self._tops.get(space), 0
        while node is not None and at < len(text):
            found = node.children.get(text[at])
            if found is None:
                break
            path.append(found)
            edge = found.edge
            if not text.startswith(edge, at):
                return Match(path, at + _common(edge, text, at))
            at += len(edge)
            node = found
        return Match(path, at)

    def insert(self, space: bytes, text: bytes) -> Leaf | None:
        """The node at the end of ``text``, made if need be; None for an empty text. Follow it with ``touch``."""
        if not text:
            return None
        node = self._tops.get(space)
        if node is None:
            node = self._tops[space] = Leaf(None, b"", 0, 0)
            self._spaces[node] = space
        at = 0
        while at < len(text):
            found = node.children.get(text[at])
            if found is None:
                found = node.children[text[at]] = Leaf(node, text[at:], len(text), 0)
                self._recent[found] = None
                self.bytes += len(text) - at
                return found
            common = len(found.edge) if text.startswith(found.edge, at) else _common(found.edge, text, at)
            if common < len(found.edge):
                found = self._split(found, common)
            at += common
            node = found
        return node

    def _split(self, lower: Leaf, at: int) -> Leaf:
        """A new node in the middle of an edge; ``lower`` stays the object at its end."""
        assert lower.parent is not None, "the top has no edge"
        upper = Leaf(lower.parent, lower.edge[:at], lower.end - len(lower.edge) + at, lower.holders)
        upper.parent.children[upper.edge[0]] = upper  # type: ignore[union-attr]
        lower.parent, lower.edge = upper, lower.edge[at:]
        upper.children[lower.edge[0]] = lower
        if lower.tail is not None:
            upper.tail, upper.blocks = lower.tail, lower.blocks * upper.end // lower.end
        self._recent[upper] = None
        for bit in bits(upper.holders):
            own = self._own[bit]
            own[upper] = None
            above = upper.parent
            while above is not None and above.parent is not None:
                own.move_to_end(above)
                above = above.parent
        return upper

    def touch(self, leaf: Leaf, bit: int) -> None:
        """The text that ends at ``leaf`` is used by the instance ``bit``; then limits are kept, oldest first."""
        recent, own = self._recent, self._own.setdefault(bit, OrderedDict())
        if leaf not in recent:
            return  # evicted meanwhile
        added = 0
        node = leaf
        while node.parent is not None:
            recent.move_to_end(node)
            if node.holders & bit:
                own.move_to_end(node)
            else:
                node.holders |= bit
                own[node] = None
                added += len(node.edge)
            node = node.parent
        self._own_bytes[bit] = self._own_bytes.get(bit, 0) + added
        self._keep_own(bit)
        while self.bytes > self._bytes_max or len(recent) > self._nodes_max:
            self._evict(next(iter(recent)))

    def limit(self, bit: int, bytes_max: int) -> None:
        """Forget what an instance used longest ago beyond ``bytes_max``, now and later: its cache holds no more."""
        self._own_bytes_max[bit] = bytes_max
        self._keep_own(bit)

    def own_bytes(self, bit: int) -> int:
        """How much text an instance holds, as far as is known here."""
        return self._own_bytes.get(bit, 0)

    def drop(self, bit: int) -> None:
        """The instance holds nothing any more."""
        for node in self._own.pop(bit, ()):
            node.holders &= ~bit
        self._own_bytes.pop(bit, None)
        self._own_bytes_max.pop(bit, None)

    def _keep_own(self, bit: int) -> None:
        bytes_max = self._own_bytes_max.get(bit)
        if bytes_max is None:
            return
        own = self._own.get(bit)
        while own and self._own_bytes[bit] > bytes_max:
            node, _ = own.popitem(last=False)
            node.holders &= ~bit
            self._own_bytes[bit] -= len(node.edge)

    def _evict(self, node: Leaf) -> None:
        """Remove the node that was used longest ago: a leaf, since using a text uses all that leads to it."""
        assert not node.children, "a node was used less recently than what hangs below it"
        assert node.parent is not None, "the top is no member of the order"
        del self._recent[node]
        self.bytes -= len(node.edge)
        for bit in bits(node.holders):
            del self._own[bit][node]
            self._own_bytes[bit] -= len(node.edge)
        parent = node.parent
        del parent.children[node.edge[0]]
        if parent.parent is None and not parent.children:
            del self._tops[self._spaces.pop(parent)]


def bits(mask: int) -> Iterator[int]:
    """The set bits of a mask, each as a mask."""
    while mask:
        bit = mask & -mask
        yield bit
        mask ^= bit


def _common(edge: bytes, text: bytes, at: int) -> int:
    """How many bytes ``edge`` and ``text`` from ``at`` have in common, by halving."""
    low, high = 0, min(len(edge), len(text) - at)
    while low < high:
        middle = (low + high + 1) // 2
        if edge[low:middle] == text[at + low : at + middle]:
            low = middle
        else:
            high = middle - 1
    return low
