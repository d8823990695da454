"""Block copy plans: which source bytes go to which destination bytes. Pure arithmetic on NumPy arrays.

Offsets are in bytes from the start of a region. Source and destination regions correspond by index (layer by layer).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vllm_fleet.core.errors import BadRequest

Ints: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True)
class BlockShape:
    """How one region is cut into blocks: ``block_bytes`` long, ``block_stride`` apart, ``blocks`` of them."""

    block_bytes: int
    block_stride: int
    blocks: int


class Extent(NamedTuple):
    """What a plan's bounds can be checked by at once, for regions of one size. Exact, or above it."""

    regions: int
    """One more than the highest region named."""
    source_end: int
    """One more than the highest byte named on one side, in any region, ..."""
    target_end: int
    """... and on the other."""
    shortest: int
    longest: int
    """Bytes of runs."""

    def inside(self, regions: int, source_bytes: int, target_bytes: int) -> bool:
        """Whether all runs lie in ``regions`` regions of so many bytes, and none is empty. False may be too strict."""
        return (
            self.shortest > 0
            and self.regions <= regions
            and self.source_end <= source_bytes
            and self.target_end <= target_bytes
        )


@dataclass(frozen=True)
class BlockCopyPlan:
    """Runs of bytes to copy; four arrays of shape [runs], dtype int64, which nobody changes once the plan is made.

    ``grant`` is the transfer on whose behalf the owner lets the source be read.
    """

    grant: str
    region: Ints
    source: Ints
    target: Ints
    nbytes: Ints
    known: Extent | None = field(default=None, repr=False, compare=False)
    """The extent, where whoever made the plan knows it."""

    def __len__(self) -> int:
        return len(self.nbytes)

    @cached_property
    def total_bytes(self) -> int:
        """Bytes the plan copies."""
        return int(np.add.reduce(self.nbytes))

    @cached_property
    def extent(self) -> Extent:
        """Of a plan of at least one run. Worked out once: 15 us for 1024 runs where it is not known."""
        return self.known or _measure(self)

    def split(self, bytes_max: int) -> BlockCopyPlan:
        """The same copies with no run longer than ``bytes_max``."""
        if not len(self) or self.extent.longest <= bytes_max:
            return self
        parts = -(-self.nbytes // bytes_max)
        if int(parts.max()) <= 1:  # lengths below 0, seen as unsigned ones in the extent
            return self
        index = np.repeat(np.arange(len(self)), parts)
        within = np.arange(len(index)) - np.repeat(np.cumsum(parts) - parts, parts)
        skipped = within * bytes_max
        nbytes = np.minimum(self.nbytes[index] - skipped, bytes_max)
        return BlockCopyPlan(
            self.grant, self.region[index], self.source[index] + skipped, self.target[index] + skipped, nbytes
        )

    def pieces(self, runs_max: int, bytes_max: int, start: int = 0) -> Iterator[slice]:
        """Consecutive slices of the runs from ``start`` on, each of at most ``runs_max`` runs and, unless a single run
        is longer, ``bytes_max`` bytes."""
        ends = np.cumsum(self.nbytes)
        while start < len(self):
            base = int(ends[start - 1]) if start else 0
            stop = int(np.searchsorted(ends, base + bytes_max, side="right"))
            stop = min(max(stop, start + 1), start + runs_max, len(self))
            yield slice(start, stop)
            start = stop


FAR = 1 << 62
"""Where extents end that cannot be inside any memory; sums of two offsets below it do not wrap around."""


def _measure(plan: BlockCopyPlan) -> Extent:
    """Negative numbers are seen as unsigned ones: far beyond every end."""
    highest = np.maximum.reduce
    longest = int(highest(plan.nbytes.view(np.uint64)))
    shortest = longest if bool((plan.nbytes == plan.nbytes[0]).all()) else int(np.minimum.reduce(plan.nbytes))
    regions = int(highest(plan.region.view(np.uint64))) + 1
    ends = []
    for offsets in (plan.source, plan.target):
        end = int(highest(offsets.view(np.uint64))) + longest
        if shortest != longest and end < FAR:
            end = int(highest(offsets + plan.nbytes))
        ends.append(end)
    return Extent(regions, ends[0], ends[1], shortest, longest)


def plan_blocks(
    shapes: Sequence[BlockShape], source_blocks: Sequence[int], target_blocks: Sequence[int], grant: str
) -> BlockCopyPlan:
    """Copy block ``source_blocks[i]`` to block ``target_blocks[i]`` in every region.

    Blocks that are neighbours on both sides are merged into one run where blocks have no gaps between them.

    Raises:
        BadRequest: the lists differ in length, or a block is outside a region.
    """
    source, target = np.asarray(source_blocks, np.int64), np.asarray(target_blocks, np.int64)
    if source.shape != target.shape or source.ndim != 1:
        raise BadRequest(f"{len(source)} source blocks need as many target blocks, not {len(target)}")
    if not len(source) or not shapes:
        empty = np.zeros(0, np.int64)
        return BlockCopyPlan(grant, empty, empty, empty, empty)
    if int(min(source.min(), target.min())) < 0:
        raise BadRequest("block ids must not be negative")
    starts = np.flatnonzero(np.r_[True, (np.diff(source) != 1) | (np.diff(target) != 1)])
    lengths = np.diff(np.r_[starts, len(source)])
    extent = _extent_of_blocks(shapes, int(source.max()), int(target.max()), lengths)
    regions, sources, targets, sizes = [], [], [], []
    for index, shape in enumerate(shapes):
        if int(target.max()) >= shape.blocks:
            raise BadRequest(f"block {int(target.max())} is outside region {index} of {shape.blocks} blocks")
        dense = shape.block_bytes == shape.block_stride
        first_source, first_target = (source[starts], target[starts]) if dense else (source, target)
        count = lengths if dense else np.ones(len(source), np.int64)
        regions.append(np.full(len(first_source), index, np.int64))
        sources.append(first_source * shape.block_stride)
        targets.append(first_target * shape.block_stride)
        sizes.append(count * shape.block_bytes)
    region, first, second = np.concatenate(regions), np.concatenate(sources), np.concatenate(targets)
    return BlockCopyPlan(grant, region, first, second, np.concatenate(sizes), extent)


def _extent_of_blocks(shapes: Sequence[BlockShape], source: int, target: int, lengths: Ints) -> Extent:
    """The extent of a plan of blocks up to ``source`` and ``target``, in runs of ``lengths`` blocks where blocks are
    dense. In Python's integers: block ids of a peer may be so high that int64 wraps around, which must not look small.
    """
    fewest, most = int(lengths.min()), int(lengths.max())
    shortest, longest, per_block = [], [], []
    for shape in set(shapes):
        dense = shape.block_bytes == shape.block_stride
        shortest.append(shape.block_bytes * (fewest if dense else 1))
        longest.append(shape.block_bytes * (most if dense else 1))
        per_block.append((shape.block_stride, shape.block_bytes))
    source_end = max(source * stride + nbytes for stride, nbytes in per_block)
    target_end = max(target * stride + nbytes for stride, nbytes in per_block)
    return Extent(len(shapes), source_end, target_end, min(shortest), max(longest))


@dataclass(frozen=True)
class Slices:
    """Bytes inside one block that are to be copied: three arrays of shape [slices], offsets from the block's start."""

    source: Ints
    target: Ints
    nbytes: Ints


def plan_slices(
    source_shapes: Sequence[BlockShape],
    target_shapes: Sequence[BlockShape],
    slices: Slices,
    source_blocks: Sequence[int],
    target_blocks: Sequence[int],
    grant: str,
) -> BlockCopyPlan:
    """As plan_blocks, where only slices of each block are copied, and blocks may differ in size on the two sides.

    Raises:
        BadRequest: the lists differ in length, or a block or a slice is outside.
    """
    source, target = np.asarray(source_blocks, np.int64), np.asarray(target_blocks, np.int64)
    if source.shape != target.shape or source.ndim != 1:
        raise BadRequest(f"{len(source)} source blocks need as many target blocks, not {len(target)}")
    if len(source_shapes) != len(target_shapes):
        raise BadRequest(f"{len(source_shapes)} source regions need as many target regions, not {len(target_shapes)}")
    runs = len(source) * len(slices.nbytes)
    regions, sources, targets = [], [], []
    for index, (theirs, ours) in enumerate(zip(source_shapes, target_shapes, strict=True)):
        regions.append(np.full(runs, index, np.int64))
        sources.append(_spread(theirs, source, slices.source, slices.nbytes, f"source region {index}"))
        targets.append(_spread(ours, target, slices.target, slices.nbytes, f"target region {index}"))
    if not regions or not runs:
        empty = np.zeros(0, np.int64)
        return BlockCopyPlan(grant, empty, empty, empty, empty)
    nbytes = np.tile(slices.nbytes, len(source) * len(source_shapes))
    return merged(
        BlockCopyPlan(grant, np.concatenate(regions), np.concatenate(sources), np.concatenate(targets), nbytes)
    )


def merged(plan: BlockCopyPlan) -> BlockCopyPlan:
    """The same copies with runs joined where one ends, on both sides, where the next one starts."""
    if len(plan) < 2:
        return plan
    follows = (
        (np.diff(plan.region) == 0)
        & (plan.source[:-1] + plan.nbytes[:-1] == plan.source[1:])
        & (plan.target[:-1] + plan.nbytes[:-1] == plan.target[1:])
    )
    starts = np.flatnonzero(np.r_[True, ~follows])
    nbytes = np.add.reduceat(plan.nbytes, starts)
    return BlockCopyPlan(plan.grant, plan.region[starts], plan.source[starts], plan.target[starts], nbytes)


def _spread(shape: BlockShape, blocks: Ints, offsets: Ints, nbytes: Ints, what: str) -> Ints:
    """Offsets in a region of each slice of each block, block by block."""
    if len(blocks) and not 0 <= int(blocks.min()) <= int(blocks.max()) < shape.blocks:
        raise BadRequest(
            f"blocks {int(blocks.min())} to {int(blocks.max())} are not all inside {what} of {shape.blocks}"
        )
    if len(offsets) and (int(offsets.min()) < 0 or int((offsets + nbytes).max()) > shape.block_bytes):
        raise BadRequest(f"a slice reaches outside the {shape.block_bytes} bytes of a block of {what}")
    spread: Ints = (blocks[:, None] * shape.block_stride + offsets[None, :]).reshape(-1)
    return spread
