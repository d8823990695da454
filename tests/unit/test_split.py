"""How a load is shared out between tensor-parallel sizes: every head once, readers numbered alike on every rank."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_fleet.connector.intake import PeerLoad
from vllm_fleet.connector.jobs import LoadJob
from vllm_fleet.connector.split import Ranks, split_load, unread_ranks
from vllm_fleet.core.errors import BadRequest
from vllm_fleet.fabric.plan import BlockCopyPlan, BlockShape, plan_blocks, plan_slices
from vllm_fleet.wire.ticket import WorkerAddress

TOKENS, WIDTH = 3, 2
"""Tokens of a block; bytes of one token of one head."""

Array = np.ndarray


def addresses(theirs: int) -> tuple[WorkerAddress, ...]:
    return tuple(WorkerAddress("127.0.0.1", 4000 + rank) for rank in range(theirs))


def job(theirs: int, blocks: tuple[int, ...] = (7, 8), skip: int = 1) -> LoadJob:
    return LoadJob("t", "request", addresses(theirs), "engine", bytes(32), 8, blocks, skip, streamed=True)


def per_rank(heads: int, ranks: int) -> int:
    return max(1, heads // ranks)


def split(heads: int, ours: int, theirs: int, rank: int) -> list[tuple[int, PeerLoad]]:
    """The parts of one rank: from which rank of theirs, and what."""
    block_bytes = per_rank(heads, ours) * TOKENS * WIDTH
    parts = split_load(job(theirs), Ranks(ours, heads, TOKENS), rank, {block_bytes})
    return [(addresses(theirs).index(address), part) for address, part in parts]


def copy(
    heads: int, ours: int, theirs: int, part: PeerLoad, sources: list[int], targets: list[int], blocks: int
) -> BlockCopyPlan:
    """The plan of one part over one layer."""
    own, peer = (BlockShape(size := per_rank(heads, ranks) * TOKENS * WIDTH, size, blocks) for ranks in (ours, theirs))
    if part.slices is None:
        assert own == peer
        return plan_blocks([own], sources, targets, "t")
    return plan_slices([peer], [own], part.slices, sources, targets, "t")


CASES = [
    (4, 1, 2), (4, 2, 1), (8, 2, 4), (8, 4, 2), (1, 2, 4), (1, 4, 2), (2, 4, 1), (2, 1, 4), (2, 4, 2), (2, 2, 4),
    (4, 2, 2), (2, 8, 4), (2, 4, 8),
]  # fmt: skip
"""KV heads of the model, our ranks, theirs. One head: latent attention."""


def moved(heads: int, ours: int, theirs: int, blocks: int, sources: list[int], targets: list[int]) -> None:
    """Move real bytes, and compare with whole tensors [blocks, heads, tokens, bytes] that no rank has seen."""
    whole = np.random.default_rng(heads + 10 * ours + 100 * theirs).integers(
        1, 256, (blocks, heads, TOKENS, WIDTH), np.uint8
    )
    arrived = np.zeros_like(whole)
    arrived[targets] = whole[sources]

    def held(tensor: Array, ranks: int, rank: int) -> Array:
        first = rank * heads // ranks
        return np.ascontiguousarray(tensor[:, first : first + per_rank(heads, ranks)]).reshape(-1)

    for rank in range(ours):
        target = np.zeros_like(held(whole, ours, rank))
        for peer, part in split(heads, ours, theirs, rank):
            plan, source = copy(heads, ours, theirs, part, sources, targets, blocks), held(whole, theirs, peer)
            for start, to, size in zip(plan.source, plan.target, plan.nbytes, strict=True):
                assert not target[to : to + size].any(), "a byte is written twice"
                target[to : to + size] = source[start : start + size]
        assert (target == held(arrived, ours, rank)).all(), f"rank {rank}"


@pytest.mark.parametrize(("heads", "ours", "theirs"), CASES)
def test_every_head_of_ours_arrives_once(heads: int, ours: int, theirs: int) -> None:
    moved(heads, ours, theirs, 5, [3, 0, 1], [0, 1, 4])


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int, int]:
    heads = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    fits = [ranks for ranks in (1, 2, 3, 4, 6, 8, 12) if heads % ranks == 0 or ranks % heads == 0]
    return heads, draw(st.sampled_from(fits)), draw(st.sampled_from(fits))


@settings(max_examples=60, deadline=None)
@given(sizes(), st.integers(1, 5), st.data())
def test_real_bytes_for_any_sizes(size: tuple[int, int, int], blocks: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, blocks))
    sources = data.draw(st.permutations(range(blocks)))[:count]
    targets = data.draw(st.permutations(range(blocks)))[:count]
    moved(*size, blocks, sources, targets)


@settings(max_examples=60, deadline=None)
@given(sizes())
def test_readers_of_a_peer_are_numbered_alike_on_every_rank(size: tuple[int, int, int]) -> None:
    heads, ours, theirs = size
    readers: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for rank in range(ours):
        for peer, part in split(heads, ours, theirs, rank):
            readers[peer].append((part.reader, part.readers))
    for found in readers.values():
        assert sorted(found) == [(number, len(found)) for number in range(len(found))]
    unread = unread_ranks(Ranks(ours, heads, TOKENS), theirs)
    assert sorted([*readers, *unread]) == list(range(theirs)), "read or given up, each one"


@pytest.mark.parametrize(
    ("heads", "ours", "theirs", "unread"),
    [(4, 2, 2, []), (4, 1, 2, []), (4, 2, 4, []), (2, 1, 4, [1, 3]), (2, 4, 1, []), (1, 4, 2, [])],
)
def test_ranks_that_nobody_reads(heads: int, ours: int, theirs: int, unread: list[int]) -> None:
    assert unread_ranks(Ranks(ours, heads, TOKENS), theirs) == unread


@pytest.mark.parametrize(("ours", "theirs"), [(2, 4), (1, 4)])
def test_latent_attention_reads_each_rank_s_head_from_as_many_peers_as_it_has_ranks(ours: int, theirs: int) -> None:
    sources = [peer for rank in range(ours) for peer, _ in split(1, ours, theirs, rank)]
    assert len(set(sources)) == len(sources) == ours
    assert len(unread_ranks(Ranks(ours, 1, TOKENS), theirs)) == theirs - ours


def test_readers_of_replicated_heads_are_spread_over_the_replicas() -> None:
    counts: dict[int, int] = defaultdict(int)
    for rank in range(8):
        for peer, _ in split(2, 8, 4, rank):
            counts[peer] += 1
    assert counts == {0: 2, 1: 2, 2: 2, 3: 2}


def test_equal_sizes_take_whole_blocks_of_any_layers_from_the_same_rank() -> None:
    [(address, part)] = split_load(job(2), Ranks(2, 4, TOKENS), 1, {10, 20})
    assert address == addresses(2)[1]
    assert (part.slices, part.reader, part.readers) == (None, 0, 1)


@pytest.mark.parametrize(("heads", "ours", "theirs"), [(4, 2, 2), (4, 1, 2), (1, 4, 2)])
def test_a_part_says_what_the_job_says(heads: int, ours: int, theirs: int) -> None:
    wanted = job(theirs)
    for _, part in split(heads, ours, theirs, 0):
        assert (part.request, part.transfer, part.engine, part.prompt) == ("request", "t", "engine", bytes(32))
        assert (part.tokens, part.block_tokens, part.blocks, part.skip) == (8, TOKENS, wanted.blocks, wanted.skip)
        assert part.streamed


def test_whole_blocks_are_not_cut() -> None:
    for heads, ours, theirs in ((1, 2, 4), (1, 4, 2), (2, 4, 2), (2, 2, 4)):
        assert all(part.slices is None for rank in range(ours) for _, part in split(heads, ours, theirs, rank))


@pytest.mark.parametrize("block_bytes", [{24, 48}, {7}, set()])
def test_layers_that_cannot_be_cut_are_refused(block_bytes: set[int]) -> None:
    with pytest.raises(BadRequest, match="prefill has 2 tensor-parallel ranks and this instance 1"):
        split_load(job(2), Ranks(1, 4, TOKENS), 0, block_bytes)


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(BadRequest, match="4 KV heads cannot be shared by 3 ranks"):
        split_load(job(3), Ranks(2, 4, TOKENS), 0, {2 * TOKENS * WIDTH})
