"""Block copy plans: which source bytes go to which destination bytes. Pure arithmetic on NumPy arrays.

Offsets are in bytes from the start of a region. Source and destination regions correspond by index (layer by layer).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

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


@dataclass(frozen=True)
class BlockCopyPlan:
    """Runs of bytes to copy; four arrays of shape [runs], dtype int64.

    ``grant`` is the transfer on whose behalf the owner lets the source be read.
    """

    grant: str
    region: Ints
    source: Ints
    target: Ints
    nbytes: Ints

    def __len__(self) -> int:
        return len(self.nbytes)

    @property
    def total_bytes(self) -> int:
        """Bytes the plan copies."""
        return int(self.nbytes.sum())

    def split(self, bytes_max: int) -> BlockCopyPlan:
        """The same copies with no run longer than ``bytes_max``."""
        parts = -(-self.nbytes // bytes_max)
        if not len(self) or int(parts.max()) <= 1:
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
    return BlockCopyPlan(
        grant, np.concatenate(regions), np.concatenate(sources), np.concatenate(targets), np.concatenate(sizes)
    )


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
