"""What the router knows of prefixes: texts, blocks, and which text is which blocks. Pure.

Texts come from requests, blocks from KV events. The two meet by a label that the router sends with each request as
X-Session-ID and that vLLM repeats in the events of the blocks it stored for it: so nobody has to tokenize, render chat
templates or hash, and neither the request nor an instance waits for anything.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from vllm_fleet.core import limits
from vllm_fleet.core.ids import InstanceName
from vllm_fleet.router.policies.facts import BYTES_PER_TOKEN, Facts
from vllm_fleet.router.prefix.blocks import Block, BlockIndex, held
from vllm_fleet.router.prefix.events import AllBlocksCleared, BlockRemoved, BlockStored, Event
from vllm_fleet.router.prefix.tree import Leaf, Match, PromptTree

_TEXT_MIN = 64  # less in common than this is no prefix: JSON itself begins alike


class PrefixBook:
    """Shared by the prefix policies of prefill and decode."""

    def __init__(
        self,
        own: str,
        *,
        bytes_max: int = limits.PREFIX_TEXT_BYTES_MAX,
        nodes_max: int = limits.PREFIX_TEXTS_MAX,
        blocks_max: int = limits.PREFIX_BLOCKS_MAX,
    ) -> None:
        """``own``: a word that no other router has; labels begin with it."""
        self._own = own
        self.tree = PromptTree(bytes_max, nodes_max)
        self.blocks = BlockIndex(blocks_max)
        self._bits: dict[str, int] = {}
        self._names: dict[int, InstanceName] = {}
        self._live = 0
        self._labels: OrderedDict[str, Leaf] = OrderedDict()
        self._next_label = 0
        self.learnt = 0
        """Requests whose blocks were found."""

    # Instances -----------------------------------------------------------------------------------------------------

    def bit(self, name: InstanceName) -> int:
        """The bit of an instance; given to it when it is first asked for."""
        bit = self._bits.get(name)
        if bit is None:
            bit = 1
            while bit in self._names:
                bit <<= 1
            self._bits[name], self._names[bit] = bit, name
        return bit

    def forget(self, name: InstanceName) -> None:
        """The instance left, or its cache is empty again."""
        bit = self._bits.pop(name, None)
        if bit is not None:
            del self._names[bit]
            self._live &= ~bit
            self.tree.drop(bit)
            self.blocks.clear(bit)

    def follow(self, name: InstanceName, live: bool) -> None:
        """Whether the instance's events are complete from here on; what was known of its blocks is dropped."""
        bit = self.bit(name)
        self.blocks.clear(bit)
        self._live = self._live | bit if live else self._live & ~bit

    def live(self, name: InstanceName) -> bool:
        """Whether the instance's events are followed."""
        return bool(self._live & self._bits.get(name, 0))

    def resize(self, name: InstanceName, tokens: int) -> None:
        """How many tokens the instance's KV cache holds, as far as it says."""
        self.tree.limit(self.bit(name), int(tokens * BYTES_PER_TOKEN))

    def held_blocks(self, name: InstanceName) -> int:
        """How many blocks the instance says it holds."""
        return self.blocks.held_by(self._bits.get(name, 0))

    def holds(self, name: InstanceName) -> int:
        """How much text the instance was sent and should still hold, in bytes."""
        return self.tree.own_bytes(self._bits.get(name, 0))

    # Events --------------------------------------------------------------------------------------------------------

    def take(self, name: InstanceName, events: Sequence[Event]) -> None:
        """What an instance says of its blocks."""
        bit = self.bit(name)
        for event in events:
            if isinstance(event, BlockStored):
                if event.group_idx in (None, 0):  # of models with several groups each tells the same prefixes
                    tail = self.blocks.stored(bit, event.block_hashes, event.parent_block_hash)
                    if tail is not None and event.session_id is not None:
                        self._learn(event.session_id, tail, len(event.block_hashes))
            elif isinstance(event, BlockRemoved):
                if event.group_idx in (None, 0):
                    self.blocks.removed(bit, event.block_hashes)
            else:
                assert isinstance(event, AllBlocksCleared)
                self.blocks.clear(bit)
                self.tree.drop(bit)

    def _learn(self, label: str, tail: Block, new: int) -> None:
        """``tail`` ends a part of what the labelled request computed: of its prompt, and later of its answer."""
        leaf = self._labels.get(label)
        if leaf is None:
            return
        if leaf.tail is None:
            self.learnt += 1
        elif leaf.tail.depth >= tail.depth:
            return  # the other instance of the pair told it first
        # The prompt comes in chunks of several blocks, the answer block by block: with it the text ends sooner than
        # its blocks, by a block at most that is counted wrong.
        if leaf.tail is None or new > 1:
            leaf.blocks = tail.depth
        leaf.tail = tail
        above = leaf.parent
        while above is not None and above.end and above.tail is None:
            above.tail, above.blocks = tail, leaf.blocks * above.end // leaf.end
            above = above.parent

    # Requests ------------------------------------------------------------------------------------------------------

    def match(self, facts: Facts) -> Match:
        """Where the request's prompt is in the tree; looked up once."""
        if facts.match is None:
            facts.match = self.tree.match(*facts.prompt)
        return facts.match

    def hits(self, facts: Facts, names: Sequence[InstanceName]) -> dict[InstanceName, int]:
        """About how many bytes of the prompt each instance holds KV of; who holds nothing may be left out."""
        path, end = self.match(facts)
        if end < _TEXT_MIN:
            return {}
        known = self._bits
        asked = {known[name]: name for name in names if name in known}
        wanted = sum(asked)
        found = _texts(path, end, wanted)
        exact = wanted & self._live
        if exact:
            self._correct(found, path, end, exact)
        return {asked[bit]: size for bit, size in found.items() if size >= _TEXT_MIN}

    def _correct(self, found: dict[int, int], path: list[Leaf], end: int, exact: int) -> None:
        """Replace what was sent by what is held, as far as the blocks of the text are known."""
        for leaf in reversed(path):
            if leaf.tail is None:
                continue
            whole = leaf.end <= end
            blocks = leaf.blocks if whole else leaf.blocks * end // leaf.end
            size = leaf.end if whole else end
            if not blocks:
                return
            counts = held(leaf.tail, blocks, exact)
            for bit in [bit for bit in found if bit & exact and bit not in counts]:
                del found[bit]
            for bit, count in counts.items():
                if count < blocks:
                    found[bit] = size * count // blocks
                else:  # and what follows, if that was sent there too
                    found[bit] = max(size, found.get(bit, 0))
            return

    def sent(self, name: InstanceName, facts: Facts) -> None:
        """The request goes to this instance, which will hold its prompt."""
        if facts.leaf is None:
            facts.leaf = self.tree.insert(*facts.prompt)
            if facts.leaf is None:
                return
        self.tree.touch(facts.leaf, self.bit(name))
        if self._live and facts.label is None:
            facts.label = f"{self._own}-{self._next_label:x}"
            self._next_label += 1
            self._labels[facts.label] = facts.leaf
            if len(self._labels) > limits.PREFIX_LABELS_MAX:
                self._labels.popitem(last=False)


def _texts(path: list[Leaf], end: int, wanted: int) -> dict[int, int]:
    """How much of the text was sent to each instance and should still be there."""
    found: dict[int, int] = {}
    left = wanted
    for leaf in reversed(path):
        here = leaf.holders & left
        if not here:
            continue
        left ^= here
        size = leaf.end if leaf.end < end else end
        while here:
            bit = here & -here
            found[bit] = size
            here ^= bit
        if not left:
            break
    return found
