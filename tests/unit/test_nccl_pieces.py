"""The sizes of an nccl transfer's messages, and the first one cut ahead of the others."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_fleet.fabric.transports.cuda.nccl_pieces import HALVED_BYTES, lead_and_rest, message_sizes, pieces_of
from vllm_fleet.fabric.transports.cuda.pieces import ALIGNMENT, cut

MIB = 1 << 20


@pytest.mark.parametrize("chunk", [4096, 5 * MIB, 15 * MIB, 31 * MIB])
@pytest.mark.parametrize("whole", [0.001, 0.3, 1, 1.7, 3, 9, 33])
def test_sizes_add_up_and_fit(chunk: int, whole: float) -> None:
    total = max(1, int(chunk * whole))
    sizes = message_sizes(total, chunk)
    assert sum(sizes) == total
    assert 0 < min(sizes) <= max(sizes) <= chunk
    assert len(sizes) <= max(2, -(-total // chunk))


def test_messages_are_alike_and_aligned() -> None:
    assert message_sizes(128 * MIB, 16 * MIB) == [16 * MIB] * 8
    assert all(size % ALIGNMENT == 0 for size in message_sizes(100 * MIB, 15 * MIB))
    assert message_sizes(MIB, 16 * MIB) == [MIB]


def test_one_message_is_copied_while_another_moves() -> None:
    assert message_sizes(HALVED_BYTES, 16 * MIB) == [HALVED_BYTES]
    assert message_sizes(12 * MIB, 16 * MIB) == [6 * MIB, 6 * MIB]
    total = HALVED_BYTES + ALIGNMENT
    assert message_sizes(total, 16 * MIB) == [total // 2 + ALIGNMENT // 2, total // 2 - ALIGNMENT // 2]


@pytest.mark.parametrize("seed", range(20))
def test_the_lead_and_the_rest_are_all_of_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    nbytes = rng.integers(1, 5000, rng.integers(1, 60)).astype(np.int64)
    if seed > 15:  # as blocks are
        nbytes[:] = 900
    address = rng.permutation(len(nbytes)).astype(np.int64) * 5000
    if seed % 2:  # some runs are neighbours
        address = np.concatenate([[0], np.cumsum(nbytes)[:-1]])
    total = int(nbytes.sum())
    cuts = np.unique(np.r_[0, rng.integers(1, total + 1, rng.integers(1, 6)), total])
    if seed > 17:
        cuts = np.unique(np.r_[cuts // 900 * 900, total])
    sizes = np.diff(cuts).tolist()
    given = address.copy(), nbytes.copy()
    parts = list(lead_and_rest(address, nbytes, sizes, 1000))
    assert (address == given[0]).all()
    assert (nbytes == given[1]).all()
    assert [size for part in parts for size in part.sizes] == sizes
    assert len(parts[0]) == 1

    def octets(pieces: list[tuple[int, int, int]]) -> list[int]:
        return [start + offset for start, size, _ in pieces for offset in range(size)]

    def rows(part: object) -> list[tuple[int, int, int]]:
        return list(zip(part.address.tolist(), part.nbytes.tolist(), part.within.tolist(), strict=True))  # type: ignore[attr-defined]

    whole = cut(address, nbytes, sizes, 1000)
    assert octets([row for part in parts for row in rows(part)]) == octets(rows(whole))
    for part in parts:
        for index, size in enumerate(part.sizes):
            piece = part[index]
            assert int(piece.nbytes.sum()) == size
            assert (piece.within == np.cumsum(piece.nbytes) - piece.nbytes).all()


@pytest.mark.parametrize("count", [1, 2, 7, 300])
@pytest.mark.parametrize("each", [16 << 10, 24 << 10, 32 << 10])
def test_equally_long_runs_are_counted_to_the_same_pieces(each: int, count: int) -> None:
    address = np.random.default_rng(count).permutation(2 * count).astype(np.int64)[:count] * 3 * each
    nbytes = np.full(count, each, np.int64)
    for chunk in (each, 5 * each, MIB):
        sizes = message_sizes(count * each, chunk // ALIGNMENT * ALIGNMENT or each)
        expected = cut(address, nbytes, sizes, 32 << 10)
        found = pieces_of(address, nbytes, sizes, 32 << 10)
        for name in ("address", "within", "nbytes", "starts"):
            assert (getattr(found, name) == getattr(expected, name)).all(), name
        assert found.sizes == expected.sizes
