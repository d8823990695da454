"""Cutting runs into staging-sized pieces, against a model that copies byte by byte."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_fleet.fabric.transports.cuda.pieces import cut, parts, uniform

lengths = st.lists(st.integers(1, 70), max_size=40)
gaps = st.lists(st.integers(0, 3), min_size=40, max_size=40)


def runs_of(sizes: list[int], spaces: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Runs one after the other in memory, with gaps of ``spaces`` bytes (0: neighbours) between them."""
    addresses, here = [], 1000
    for size, space in zip(sizes, spaces, strict=False):
        addresses.append(here)
        here += size + space
    return np.array(addresses, np.int64), np.array(sizes, np.int64)


@given(lengths, gaps, st.integers(1, 64), st.integers(0, 9), st.one_of(st.none(), st.integers(1, 20)))
def test_pieces_hold_every_byte_in_order(
    sizes: list[int], spaces: list[int], chunk: int, seed: int, row_max: int | None
) -> None:
    addresses, nbytes = runs_of(sizes, spaces)
    order = np.random.default_rng(seed).permutation(len(sizes))
    addresses, nbytes = addresses[order], nbytes[order]
    wanted = [int(a) + i for a, n in zip(addresses, nbytes, strict=True) for i in range(int(n))]
    total = int(nbytes.sum())
    pieces = cut(addresses, nbytes, uniform(total, chunk), row_max)
    seen: list[int] = []
    for piece in (pieces[index] for index in range(len(pieces))):
        assert piece.total_bytes <= chunk
        staging = [0] * chunk
        for address, within, size in zip(piece.address, piece.within, piece.nbytes, strict=True):
            assert 0 < size <= (row_max or total)
            assert within + size <= piece.total_bytes
            staging[int(within) : int(within + size)] = range(int(address), int(address + size))
        assert 0 not in staging[: piece.total_bytes]
        seen += staging[: piece.total_bytes]
    assert seen == wanted


@given(lengths)
def test_neighbouring_runs_are_one(sizes: list[int]) -> None:
    addresses, nbytes = runs_of(sizes, [0] * 40)
    pieces = cut(addresses, nbytes, [int(nbytes.sum())] if sizes else [])
    assert len(pieces.address) == len(pieces) == bool(sizes)


MIB = 1 << 20


@given(st.integers(0, 10**9), st.integers(1, 40 * MIB))
def test_sizes_of_pieces_add_up(total: int, chunk: int) -> None:
    chunk = max(chunk, total // 1000)
    sizes = uniform(total, chunk)
    assert sum(sizes) == total
    assert all(0 < size <= chunk for size in sizes)
    assert uniform(5, 3) == [3, 2]


def test_a_piece_that_does_not_exist() -> None:
    pieces = cut(np.array([7]), np.array([5]), [3, 2])
    for index in (-1, 2):
        with pytest.raises(IndexError):
            pieces[index]


@given(lengths, st.integers(1, 9), st.lists(st.integers(1, 300), min_size=1, max_size=4))
def test_parts_cover_all_runs_within_their_limits(sizes: list[int], runs: int, most: list[int]) -> None:
    nbytes = np.array(sizes, np.int64)
    slices = list(parts(nbytes, runs, most))
    assert [index for part in slices for index in range(part.start, part.stop)] == list(range(len(sizes)))
    for number, part in enumerate(slices):
        assert 0 < part.stop - part.start <= runs
        limit = most[min(number, len(most) - 1)]
        assert int(nbytes[part].sum()) <= limit + limit // 4 or part.stop - part.start == 1
