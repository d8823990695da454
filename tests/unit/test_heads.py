"""Head slices for unequal tensor-parallel sizes, against a naive model in NumPy that knows only whole tensors."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_fleet.core.errors import BadRequest
from vllm_fleet.fabric.heads import HeadLayout, Share, shares, slices
from vllm_fleet.fabric.plan import BlockCopyPlan, BlockShape, merged, plan_blocks, plan_slices

Array = np.ndarray


def ranks_memory(whole: Array, layout: HeadLayout) -> list[Array]:
    """Cut a tensor [blocks, heads, tokens, bytes] of the whole model into what each rank holds, as flat bytes."""
    held = []
    for rank in range(layout.ranks):
        first = rank * layout.heads // layout.ranks
        part = whole[:, first : first + max(1, layout.heads // layout.ranks)]
        if layout.order == "NHD":
            part = part.transpose(0, 2, 1, 3)
        held.append(np.ascontiguousarray(part).reshape(-1))
    return held


def apply(plan: BlockCopyPlan, source: list[Array], target: list[Array]) -> None:
    for region, start, to, size in zip(plan.region, plan.source, plan.target, plan.nbytes, strict=True):
        assert not target[region][to : to + size].any(), "a byte is written twice"
        target[region][to : to + size] = source[region][start : start + size]


def sizes(heads: int) -> st.SearchStrategy[int]:
    return st.sampled_from([t for t in (1, 2, 4, 8, 16) if heads % t == 0 or t % heads == 0])


@st.composite
def pairs(draw: st.DrawFn) -> tuple[HeadLayout, HeadLayout]:
    heads = draw(st.sampled_from([1, 2, 4, 8]))
    order: Literal["HND", "NHD"] = draw(st.sampled_from(["HND", "NHD"]))
    tokens, width = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    ours = HeadLayout(heads, draw(sizes(heads)), tokens, width, order)
    return ours, HeadLayout(heads, draw(sizes(heads)), tokens, width, order)


@given(pairs(), st.integers(1, 7), st.integers(1, 3), st.randoms(use_true_random=False))
def test_every_rank_ends_up_with_its_heads(pair: tuple[HeadLayout, HeadLayout], blocks: int, layers: int, rnd) -> None:  # type: ignore[no-untyped-def]
    ours, theirs = pair
    rng = np.random.default_rng(rnd.randrange(1 << 30))
    shape = (layers, blocks, ours.heads, ours.block_tokens, ours.token_bytes)
    whole = rng.integers(1, 256, shape, np.uint8)
    count = rng.integers(0, blocks + 1)
    source_blocks, target_blocks = rng.permutation(blocks)[:count], rng.permutation(blocks)[:count]
    moved = np.zeros_like(whole)
    moved[:, target_blocks] = whole[:, source_blocks]
    theirs_by_layer = [ranks_memory(layer, theirs) for layer in whole]
    wanted_by_layer = [ranks_memory(layer, ours) for layer in moved]
    their_shape = BlockShape(theirs.block_bytes, theirs.block_bytes, blocks)
    our_shape = BlockShape(ours.block_bytes, ours.block_bytes, blocks)
    for rank in range(ours.ranks):
        target = [np.zeros(blocks * ours.block_bytes, np.uint8) for _ in range(layers)]
        for share in shares(ours, rank, theirs):
            plan = plan_slices(
                [their_shape] * layers,
                [our_shape] * layers,
                slices(ours, theirs, share),
                source_blocks.tolist(),
                target_blocks.tolist(),
                "t",
            )
            apply(plan, [layer[share.peer_rank] for layer in theirs_by_layer], target)
        for layer in range(layers):
            assert (target[layer] == wanted_by_layer[layer][rank]).all()


@pytest.mark.parametrize(
    ("ours", "theirs", "rank", "wanted"),
    [
        (1, 2, 0, [Share(0, 0, 0, 2), Share(1, 0, 2, 2)]),
        (2, 1, 1, [Share(0, 2, 0, 2)]),
        (2, 4, 1, [Share(2, 0, 0, 1), Share(3, 0, 1, 1)]),
        (4, 2, 3, [Share(1, 1, 0, 1)]),
        (8, 4, 5, [Share(2, 0, 0, 1)]),
        (4, 8, 2, [Share(4, 0, 0, 1)]),
        (4, 8, 3, [Share(7, 0, 0, 1)]),  # head 3 is on ranks 6 and 7: our odd ranks take the second
    ],
)
def test_shares_of_four_heads(ours: int, theirs: int, rank: int, wanted: list[Share]) -> None:
    assert list(shares(HeadLayout(4, ours, 16, 256), rank, HeadLayout(4, theirs, 16, 256))) == wanted


def test_latent_attention_takes_the_whole_block_from_one_of_the_replicas() -> None:
    ours, theirs = HeadLayout(1, 4, 16, 1152), HeadLayout(1, 2, 16, 1152)
    assert [shares(ours, rank, theirs)[0].peer_rank for rank in range(4)] == [0, 1, 0, 1]
    assert slices(ours, theirs, shares(ours, 3, theirs)[0]).nbytes.tolist() == [ours.block_bytes]


def test_equal_sizes_give_the_plan_of_whole_blocks() -> None:
    layout = HeadLayout(8, 4, 16, 256)
    shape = BlockShape(layout.block_bytes, layout.block_bytes, 10)
    (share,) = shares(layout, 2, layout)
    assert share == Share(2, 0, 0, 2)
    sliced = plan_slices([shape] * 2, [shape] * 2, slices(layout, layout, share), [1, 2, 5], [3, 4, 0], "t")
    whole = plan_blocks([shape] * 2, [1, 2, 5], [3, 4, 0], "t")
    for name in ("region", "source", "target", "nbytes"):
        assert getattr(sliced, name).tolist() == getattr(whole, name).tolist()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block_tokens": 32}, "tokens in a block: 16 here, 32 there.*--block-size"),
        ({"heads": 8}, "KV heads: 4 here, 8 there"),
        ({"token_bytes": 128}, "bytes of a token and head: 256 here, 128 there"),
        ({"order": "NHD"}, "order of a block: HND here, NHD there"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_values(change: dict[str, object], words: str) -> None:
    ours = HeadLayout(4, 2, 16, 256)
    theirs = HeadLayout(**{"heads": 4, "ranks": 2, "block_tokens": 16, "token_bytes": 256, **change})  # type: ignore[arg-type]
    with pytest.raises(BadRequest, match=words):
        shares(ours, 0, theirs)


def test_sizes_that_vllm_does_not_allow_are_refused() -> None:
    with pytest.raises(BadRequest, match="6 KV heads cannot be shared by 4 ranks"):
        HeadLayout(6, 4, 16, 256)
    with pytest.raises(BadRequest, match="at least 1"):
        HeadLayout(0, 1, 16, 256)
    with pytest.raises(BadRequest, match="no rank 2 of 2"):
        shares(HeadLayout(4, 2, 16, 256), 2, HeadLayout(4, 2, 16, 256))


def test_slices_outside_a_block_are_refused() -> None:
    layout = HeadLayout(4, 2, 16, 256)
    small = BlockShape(layout.block_bytes // 2, layout.block_bytes // 2, 4)
    whole = slices(layout, layout, Share(0, 0, 0, 2))
    with pytest.raises(BadRequest, match="outside the 4096 bytes of a block of source region 0"):
        plan_slices([small], [small], whole, [0], [0], "t")
    big = BlockShape(layout.block_bytes, layout.block_bytes, 4)
    with pytest.raises(BadRequest, match="not all inside target region 0 of 4"):
        plan_slices([big], [big], whole, [0], [4], "t")


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6), st.integers(0, 6), st.integers(1, 3)), max_size=12))
def test_merging_changes_no_copy(runs: list[tuple[int, int, int, int]]) -> None:
    columns = np.array(runs, np.int64).reshape(-1, 4).T
    plan = BlockCopyPlan("t", *columns)
    joined = merged(plan)

    def bytes_of(which: BlockCopyPlan) -> list[tuple[int, int, int]]:
        rows = zip(which.region, which.source, which.target, which.nbytes, strict=True)
        return [(int(r), int(s) + i, int(t) + i) for r, s, t, n in rows for i in range(n)]

    assert bytes_of(joined) == bytes_of(plan)
    assert len(joined) <= len(plan)
