"""mix64 against its definition in plain integers, and what it must notice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_fleet.fabric.digest import FIRST, LENGTH, POSITION, SECOND, SHIFT, mix64, mix64_rows, mix64_runs

MASK = 2**64 - 1


def avalanche(word: int) -> int:
    word = (word ^ word >> SHIFT) * FIRST & MASK
    word = (word ^ word >> SHIFT) * SECOND & MASK
    return word ^ word >> SHIFT


def by_definition(run: bytes) -> int:
    padded = run + bytes(-len(run) % 8)
    words = [int.from_bytes(padded[start : start + 8], "little") for start in range(0, len(padded), 8)]
    total = sum(avalanche(word ^ (index + 1) * POSITION & MASK) for index, word in enumerate(words))
    return avalanche((total + (len(run) + 1) * LENGTH) & MASK)


@given(st.binary(max_size=200))
def test_it_is_what_the_definition_says(run: bytes) -> None:
    assert mix64(run) == by_definition(run)


def test_long_runs_and_many_runs() -> None:
    rng = np.random.default_rng(1)
    long = rng.integers(0, 256, 300_001, np.uint8)
    assert mix64(long) == by_definition(long.tobytes())
    rows = rng.integers(0, 256, (37, 1003), np.uint8)
    wanted = [by_definition(row.tobytes()) for row in rows]
    assert mix64_rows(rows).tolist() == wanted
    mixed = [*rows, long, b"", bytearray(b"ab"), memoryview(b"ab")]
    assert mix64_runs(mixed).tolist() == [*wanted, *(by_definition(bytes(run)) for run in mixed[len(rows) :])]
    assert mix64_runs([]).tolist() == []


def test_every_changed_byte_is_noticed() -> None:
    run = bytearray(np.random.default_rng(2).integers(0, 256, 100, np.uint8).tobytes())
    before = mix64(run)
    for index in range(len(run)):
        for bit in range(8):
            run[index] ^= 1 << bit
            assert mix64(run) != before
            run[index] ^= 1 << bit
    assert mix64(run) == before


@pytest.mark.parametrize("block", [8, 16, 4096])
def test_what_changes_places_is_noticed(block: int) -> None:
    rows = np.random.default_rng(3).integers(0, 256, (8, block), np.uint8)
    digests = {mix64(rows)}
    for first in range(8):
        for second in range(first):
            order = np.arange(8)
            order[[first, second]] = second, first
            digests.add(mix64(np.ascontiguousarray(rows[order])))
    assert len(digests) == 29


def test_words_that_differ_in_one_bit_and_change_places_are_noticed() -> None:
    for bit in range(64):
        words = np.zeros(64, np.uint64)
        words[5] = 1 << bit
        moved = {mix64(np.roll(words, shift).view(np.uint8)) for shift in range(64)}
        assert len(moved) == 64


def test_length_counts() -> None:
    assert len({mix64(bytes(length)) for length in range(100)}) == 100
