"""The size of pieces, and how runs are cut into them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm_fleet.fabric.pacing import PIECE_BYTES_MAX, PIECE_BYTES_MIN, Pacer


@given(st.lists(st.integers(1, 3 * PIECE_BYTES_MIN), max_size=60), st.integers(0, 70), st.integers(0, 70))
def test_pieces_cover_the_part_once_and_are_small_enough(lengths: list[int], start: int, size: int) -> None:
    nbytes = np.array(lengths, np.int64)
    part = slice(start, start + size)
    pieces = list(Pacer().pieces(nbytes, part))
    covered = [index for piece in pieces for index in range(piece.start, piece.stop)]
    assert covered == list(range(len(lengths)))[part]
    for piece in pieces:
        assert piece.stop - piece.start == 1 or int(nbytes[piece].sum()) <= PIECE_BYTES_MIN


def test_pieces_grow_while_they_are_quick() -> None:
    pacer = Pacer()
    sizes = []
    for _ in range(20):
        sizes.append(pacer.piece_bytes)
        pacer.took(pacer.piece_bytes, 0.001)
    assert sizes[:3] == [PIECE_BYTES_MIN, 2 * PIECE_BYTES_MIN, 4 * PIECE_BYTES_MIN]
    assert sizes[-1] == PIECE_BYTES_MAX


def test_pieces_shrink_when_they_take_long_and_stay_when_neither() -> None:
    pacer = Pacer()
    for _ in range(5):
        pacer.took(pacer.piece_bytes, 0.001)
    grown = pacer.piece_bytes
    pacer.took(grown, 0.1)
    assert pacer.piece_bytes == grown
    pacer.took(grown, 1.0)
    assert pacer.piece_bytes == grown // 2
    for _ in range(50):
        pacer.took(pacer.piece_bytes, 1.0)
    assert pacer.piece_bytes == PIECE_BYTES_MIN


def test_a_small_last_piece_says_nothing_about_speed() -> None:
    pacer = Pacer()
    pacer.took(1, 0.0001)
    assert pacer.piece_bytes == PIECE_BYTES_MIN


def test_a_size_learned_between_pieces_is_used_for_the_next() -> None:
    pacer = Pacer()
    nbytes = np.full(16, PIECE_BYTES_MIN, np.int64)
    pieces = []
    for piece in pacer.pieces(nbytes, slice(0, 16)):
        pieces.append(piece)
        pacer.took(pacer.piece_bytes, 0.001)
    assert pieces == [slice(0, 1), slice(1, 3), slice(3, 7), slice(7, 15), slice(15, 16)]
