"""Cutting runs of memory into pieces that fit a staging buffer. Pure arithmetic on NumPy arrays.

The runs of a question, one after the other, are a stream of bytes, which both sides of a transfer cut alike: the sizes
of the pieces depend on nothing but the number of bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vllm_fleet.fabric.plan import Ints

ALIGNMENT = 32 << 10
"""Sizes of pieces are multiples of this where they can be: the usual blocks are then not cut in two."""


class Piece(NamedTuple):
    """Runs that lie side by side in one staging buffer; arrays of shape [rows]."""

    address: Ints
    within: Ints
    nbytes: Ints
    total_bytes: int


@dataclass(frozen=True)
class Pieces:
    """All pieces of some runs. Arrays of shape [rows]: the runs, cut at the boundaries of pieces."""

    address: Ints
    within: Ints
    """Where each row begins in its piece, in bytes."""
    nbytes: Ints
    starts: Ints
    """Index of each piece's first row, and the number of rows; shape [pieces + 1]."""
    sizes: list[int]
    """Bytes of each piece."""

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Piece:
        if not 0 <= index < len(self):
            raise IndexError(f"no piece {index} of {len(self)}")
        rows = slice(int(self.starts[index]), int(self.starts[index + 1]))
        return Piece(self.address[rows], self.within[rows], self.nbytes[rows], self.sizes[index])


def uniform(total: int, chunk_bytes: int) -> list[int]:
    """Sizes of pieces of ``chunk_bytes``; the last may be shorter."""
    whole, rest = divmod(total, chunk_bytes)
    return [chunk_bytes] * whole + [rest] * (rest > 0)


def cut(address: Ints, nbytes: Ints, sizes: list[int], row_bytes_max: int | None = None) -> Pieces:
    """Cut runs (arrays of shape [runs], lengths above 0) into pieces of the given sizes, whose sum is that of the runs.

    Neighbouring runs become one; rows longer than ``row_bytes_max`` are split.
    """
    if not len(address):
        empty = np.zeros(0, np.int64)
        return Pieces(empty, empty, empty, np.zeros(1, np.int64), [])
    apart = address[1:] != address[:-1] + nbytes[:-1]
    if not bool(apart.all()):
        first = np.flatnonzero(np.r_[True, apart])
        address, nbytes = address[first], np.add.reduceat(nbytes, first)
    if row_bytes_max is not None and int(nbytes.max()) > row_bytes_max:
        address, nbytes = _split(address, nbytes, row_bytes_max)
    ends = np.cumsum(nbytes)
    begins, total = ends - nbytes, int(ends[-1])
    boundaries = np.zeros(len(sizes), np.int64)
    np.cumsum(sizes[:-1], out=boundaries[1:])
    run = np.searchsorted(begins, boundaries, side="right") - 1
    inside = boundaries != begins[run]  # boundaries that cut a run in two
    if bool(inside.any()):
        after, skipped = run[inside] + 1, boundaries[inside]
        address = np.insert(address, after, address[run[inside]] + skipped - begins[run[inside]])
        begins = np.insert(begins, after, skipped)
        nbytes = np.diff(begins, append=total)
    starts = np.append(np.searchsorted(begins, boundaries), len(begins))
    return Pieces(address, begins - np.repeat(boundaries, np.diff(starts)), nbytes, starts, sizes)


def _split(address: Ints, nbytes: Ints, bytes_max: int) -> tuple[Ints, Ints]:
    parts = -(-nbytes // bytes_max)
    index = np.repeat(np.arange(len(nbytes)), parts)
    skipped = (np.arange(len(index)) - np.repeat(np.cumsum(parts) - parts, parts)) * bytes_max
    return address[index] + skipped, np.minimum(nbytes[index] - skipped, bytes_max)


def parts(nbytes: Ints, runs_max: int, bytes_max: list[int]) -> Iterator[slice]:
    """Consecutive slices of runs, one for each question of a transfer.

    A slice has at most ``runs_max`` runs and, unless it is a single run, ``bytes_max[i]`` bytes (the last entry is that
    of all slices that follow); or a quarter more where nothing is left then.
    """
    ends = np.cumsum(nbytes)
    start = index = 0
    while start < len(nbytes):
        base = int(ends[start - 1]) if start else 0
        most = bytes_max[min(index, len(bytes_max) - 1)]
        if int(ends[-1]) - base <= most + most // 4:
            most = int(ends[-1]) - base
        stop = int(np.searchsorted(ends, base + most, side="right"))
        stop = min(max(stop, start + 1), start + runs_max, len(nbytes))
        yield slice(start, stop)
        start, index = stop, index + 1
