"""The radix tree and the index of blocks, against models too simple to be wrong."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vllm_fleet.router.prefix.blocks import Block, BlockIndex, held
from vllm_fleet.router.prefix.tree import Leaf, PromptTree

RELAXED = settings(deadline=None)  # a busy machine is no failure

TEXTS = st.text(alphabet="ab", min_size=1, max_size=12).map(str.encode)
SPACES = st.sampled_from([b"x", b"y"])
HUGE = 1 << 40


def put(tree: PromptTree, text: bytes, bit: int, space: bytes = b"x") -> Leaf:
    leaf = tree.insert(space, text)
    assert leaf is not None
    tree.touch(leaf, bit)
    return leaf


def common(one: bytes, other: bytes) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def known(tree: PromptTree, text: bytes, bit: int, space: bytes = b"x") -> int:
    """How much of ``text`` an instance was sent, as the tree says."""
    path, end = tree.match(space, text)
    return max((min(leaf.end, end) for leaf in path if leaf.holders & bit), default=0)


@RELAXED
@given(st.lists(st.tuples(SPACES, TEXTS, st.sampled_from([1, 2, 4]))), SPACES, TEXTS)
def test_a_text_is_known_as_far_as_the_nearest_one_that_was_sent(
    sent: list[tuple[bytes, bytes, int]], space: bytes, asked: bytes
) -> None:
    tree = PromptTree(HUGE, HUGE)
    for where, text, bit in sent:
        put(tree, text, bit, where)
    for bit in (1, 2, 4):
        near = [common(text, asked) for where, text, to in sent if (where, to) == (space, bit)]
        assert known(tree, asked, bit, space) == max(near, default=0)
    tree_bytes = sum(len({text[:end] for where, text, _ in sent if where == s for end in range(1, len(text) + 1)})
                     for s in (b"x", b"y"))  # fmt: skip
    assert tree.bytes == tree_bytes


@RELAXED
@given(st.lists(st.tuples(TEXTS, st.sampled_from([1, 2]))))
def test_matching_changes_nothing_and_inserting_finds_the_same_node_again(sent: list[tuple[bytes, int]]) -> None:
    tree = PromptTree(HUGE, HUGE)
    leaves = {text: put(tree, text, bit) for text, bit in sent}
    for text, leaf in leaves.items():
        size = tree.bytes, len(tree)
        assert tree.insert(b"x", text) is leaf, "a node keeps its identity when edges split"
        assert leaf.end == len(text)
        assert tree.match(b"x", text).end == len(text)
        assert (tree.bytes, len(tree)) == size


class TreeMachine(RuleBasedStateMachine):
    """Limits, evictions and departures: counts stay true, and who holds a text holds all that leads to it."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = PromptTree(60, 12)

    @rule(text=TEXTS, bit=st.sampled_from([1, 2, 4]), space=SPACES)
    def send(self, text: bytes, bit: int, space: bytes) -> None:
        put(self.tree, text, bit, space)
        if len(text) <= self.tree._own_bytes_max.get(bit, HUGE):
            assert known(self.tree, text, bit, space) == len(text), "the text just used is the last to go"

    @rule(bit=st.sampled_from([1, 2, 4]), size=st.integers(0, 40))
    def shrink(self, bit: int, size: int) -> None:
        self.tree.limit(bit, size)

    @rule(bit=st.sampled_from([1, 2, 4]))
    def leave(self, bit: int) -> None:
        self.tree.drop(bit)
        assert self.tree.own_bytes(bit) == 0

    @invariant()
    def counts_are_true(self) -> None:
        tree = self.tree
        nodes = [leaf for top in tree._tops.values() for leaf in walk(top)]
        assert len(nodes) == len(tree) <= 12
        assert sum(len(leaf.edge) for leaf in nodes) == tree.bytes <= 60
        for bit in (1, 2, 4):
            mine = [leaf for leaf in nodes if leaf.holders & bit]
            assert sum(len(leaf.edge) for leaf in mine) == tree.own_bytes(bit) <= tree._own_bytes_max.get(bit, HUGE)
            for leaf in mine:
                assert leaf.parent is not None
                assert leaf.parent.parent is None or leaf.parent.holders & bit
        for leaf in nodes:
            assert leaf.parent is not None
            assert leaf.end == leaf.parent.end + len(leaf.edge)
            assert leaf.parent.children[leaf.edge[0]] is leaf


def walk(top: Leaf) -> list[Leaf]:
    return [one for child in top.children.values() for one in (child, *walk(child))]


TestTree = TreeMachine.TestCase
TestTree.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_the_oldest_is_forgotten_first_and_leaves_before_what_leads_to_them() -> None:
    tree = PromptTree(HUGE, HUGE)
    put(tree, b"shared-one", 1)
    put(tree, b"shared-two", 1)
    tree.limit(1, len("shared-") + len("two"))
    assert known(tree, b"shared-one", 1) == len("shared-")
    assert known(tree, b"shared-two", 1) == len("shared-two")
    put(tree, b"shared-one", 1)
    assert known(tree, b"shared-two", 1) == len("shared-")


# Blocks ------------------------------------------------------------------------------------------------------------


class BlocksMachine(RuleBasedStateMachine):
    """Prefixes of small numbers; a block's hash is its whole prefix, as vLLM's stands for it."""

    def __init__(self) -> None:
        super().__init__()
        self.index = BlockIndex(1 << 20)
        self.model: dict[int, dict[tuple[int, ...], int]] = {1: {}, 2: {}}
        self.tails: dict[tuple[int, ...], Block] = {}

    @rule(
        bit=st.sampled_from([1, 2]), path=st.lists(st.integers(0, 1), min_size=1, max_size=5), start=st.integers(0, 4)
    )
    def store(self, bit: int, path: list[int], start: int) -> None:
        start = min(start, len(path) - 1)
        prefixes = [tuple(path[: end + 1]) for end in range(start, len(path))]
        before = tuple(path[:start]) or None
        tail = self.index.stored(bit, [hash_of(one) for one in prefixes], None if before is None else hash_of(before))
        reachable = before is None or before in self.tails or any(before in held for held in self.model.values())
        if tail is None:
            assert not reachable
            return
        for one in prefixes:
            self.model[bit][one] = self.model[bit].get(one, 0) + 1
        self.tails[prefixes[-1]] = tail  # a text refers to it from now on

    @rule(bit=st.sampled_from([1, 2]), path=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def remove(self, bit: int, path: list[int]) -> None:
        one = tuple(path)
        self.index.removed(bit, [hash_of(one)])
        count = self.model[bit].get(one, 0)
        if count > 1:
            self.model[bit][one] = count - 1
        else:
            self.model[bit].pop(one, None)

    @rule(bit=st.sampled_from([1, 2]))
    def clear(self, bit: int) -> None:
        self.index.clear(bit)
        self.model[bit] = {}

    @invariant()
    def the_same_is_held(self) -> None:
        for bit in (1, 2):
            assert self.index.held_by(bit) == len(self.model[bit])
        for path, tail in self.tails.items():
            assert tail.depth == len(path)
            for blocks in range(len(path) + 1):
                count = {bit: self.contiguous(bit, path[:blocks]) for bit in (1, 2)}
                assert held(tail, blocks, 3) == {bit: size for bit, size in count.items() if size}

    def contiguous(self, bit: int, path: tuple[int, ...]) -> int:
        count = 0
        while count < len(path) and path[: count + 1] in self.model[bit]:
            count += 1
        return count


def hash_of(path: tuple[int, ...]) -> int:
    return int("1" + "".join(map(str, path)), 3)


TestBlocks = BlocksMachine.TestCase
TestBlocks.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_blocks_nobody_refers_to_are_gone() -> None:
    index = BlockIndex(100)
    index.stored(1, [1, 2, 3], None)
    index.removed(1, [3])
    assert len(index) == 2
    index.removed(1, [1])
    assert len(index) == 2, "the one after it still hangs on it"
    index.removed(1, [2])
    assert len(index) == 0


def test_a_full_index_and_unknown_parents_are_counted_and_cost_nothing_else() -> None:
    index = BlockIndex(2)
    assert index.stored(1, [1, 2, 3], None) is None
    assert (index.held_by(1), index.overflows) == (2, 1)
    assert index.stored(1, [9], 8) is None
    assert index.orphans == 1
    index.removed(1, [7, b"x"])
    index.removed(2, [1])
    assert index.held_by(1) == 2
