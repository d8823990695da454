"""Block copy plans against a naive model that copies block by block."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_fleet.core.errors import BadRequest
from vllm_fleet.fabric.plan import BlockCopyPlan, BlockShape, Extent, plan_blocks


def apply(plan: BlockCopyPlan, source: list[bytearray], target: list[bytearray]) -> None:
    for region, start, to, size in zip(plan.region, plan.source, plan.target, plan.nbytes, strict=True):
        target[region][to : to + size] = source[region][start : start + size]


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[BlockShape], list[int], list[int]]:
    blocks = draw(st.integers(1, 24))
    shapes = []
    for _ in range(draw(st.integers(0, 3))):
        size = draw(st.integers(1, 9))
        shapes.append(BlockShape(size, size + draw(st.sampled_from([0, 0, 3])), blocks))
    count = draw(st.integers(0, blocks))
    ids = st.permutations(range(blocks))
    return shapes, draw(ids)[:count], draw(ids)[:count]


@given(cases(), st.integers(1, 40))
def test_a_plan_copies_what_block_by_block_copies(
    case: tuple[list[BlockShape], list[int], list[int]], run_bytes: int
) -> None:
    shapes, sources, targets = case
    rng = np.random.default_rng(0)
    memory = [bytearray(rng.bytes(shape.block_stride * shape.blocks)) for shape in shapes]
    wanted = [bytearray(len(region)) for region in memory]
    for region, shape in enumerate(shapes):
        for source, target in zip(sources, targets, strict=True):
            a, b = source * shape.block_stride, target * shape.block_stride
            wanted[region][b : b + shape.block_bytes] = memory[region][a : a + shape.block_bytes]
    plan = plan_blocks(shapes, sources, targets, "t")
    for version in (plan, plan.split(run_bytes)):
        got = [bytearray(len(region)) for region in memory]
        apply(version, memory, got)
        assert got == wanted
        assert version.total_bytes == len(sources) * sum(shape.block_bytes for shape in shapes)
    assert int(plan.split(run_bytes).nbytes.max(initial=0)) <= run_bytes


def test_neighbours_are_merged_into_runs() -> None:
    plan = plan_blocks([BlockShape(4, 4, 10)], [1, 2, 3, 7], [4, 5, 6, 7], "t")
    assert plan.source.tolist() == [4, 28]
    assert plan.target.tolist() == [16, 28]
    assert plan.nbytes.tolist() == [12, 4]


def test_blocks_with_gaps_are_not_merged() -> None:
    assert plan_blocks([BlockShape(4, 6, 10)], [1, 2], [4, 5], "t").nbytes.tolist() == [4, 4]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 8), st.integers(1, 120))
def test_pieces_cover_all_runs_within_limits(sizes: list[int], runs_max: int, bytes_max: int) -> None:
    zeros = np.zeros(len(sizes), np.int64)
    plan = BlockCopyPlan("t", zeros, zeros, zeros, np.array(sizes, np.int64))
    pieces = list(plan.pieces(runs_max, bytes_max))
    assert [index for piece in pieces for index in range(piece.start, piece.stop)] == list(range(len(sizes)))
    for piece in pieces:
        count = piece.stop - piece.start
        assert 1 <= count <= runs_max
        assert count == 1 or sum(sizes[piece]) <= bytes_max


def test_bad_plans_are_refused_with_both_numbers() -> None:
    with pytest.raises(BadRequest, match="2 source blocks need as many target blocks, not 1"):
        plan_blocks([BlockShape(4, 4, 10)], [1, 2], [4], "t")
    with pytest.raises(BadRequest, match="block 10 is outside region 0 of 10 blocks"):
        plan_blocks([BlockShape(4, 4, 10)], [1], [10], "t")
    with pytest.raises(BadRequest, match="negative"):
        plan_blocks([BlockShape(4, 4, 10)], [-1], [1], "t")


def naive_extent(plan: BlockCopyPlan) -> Extent:
    runs = list(
        zip(plan.region.tolist(), plan.source.tolist(), plan.target.tolist(), plan.nbytes.tolist(), strict=True)
    )
    sizes = [size for *_, size in runs]
    return Extent(
        max(region for region, *_ in runs) + 1,
        max(start + size for _, start, _, size in runs),
        max(to + size for _, _, to, size in runs),
        min(sizes),
        max(sizes),
    )


@given(cases())
def test_the_extent_of_blocks_is_known_and_never_too_small(
    case: tuple[list[BlockShape], list[int], list[int]],
) -> None:
    plan = plan_blocks(*case, "t")
    if not len(plan):
        assert plan.known is None
        return
    assert plan.known is not None
    assert plan.extent == plan.known == naive_extent(plan)
    assert BlockCopyPlan("t", plan.region, plan.source, plan.target, plan.nbytes).extent == plan.known


NUMBERS = st.one_of(st.integers(-5, 40), st.sampled_from([-(1 << 63), -(1 << 62), 1 << 62, (1 << 63) - 1]))


@given(st.lists(st.tuples(st.integers(-1, 3), NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=6))
def test_what_an_extent_lets_pass_is_inside(runs: list[tuple[int, int, int, int]]) -> None:
    region, source, target, nbytes = (np.array(column, np.int64) for column in zip(*runs, strict=True))
    plan = BlockCopyPlan("t", region, source, target, nbytes)
    inside = all(
        0 <= region < 2 and size > 0 and 0 <= start <= 40 - size and 0 <= to <= 30 - size
        for region, start, to, size in runs
    )
    assert plan.extent.inside(2, 40, 30) == inside


def test_block_ids_that_wrap_around_are_not_inside() -> None:
    plan = plan_blocks([BlockShape(1 << 20, 1 << 20, 4)], [(1 << 44) + 1], [2], "t")
    assert plan.source.tolist() == [1 << 20], "the arrays do wrap around"
    assert not plan.extent.inside(1, 4 << 20, 4 << 20)
