"""mix64: the 64-bit checksum of a run of bytes, the same bit for bit from this module and from the GPU kernel.

    digest = avalanche(sum of avalanche(word[i] ^ (i + 1) * POSITION) + (nbytes + 1) * LENGTH)        modulo 2**64

``word`` are the run's bytes as little-endian 8-byte words, the last one padded with zeros; ``avalanche`` is a bijection
of 64-bit words (xor-shift, multiply, xor-shift, multiply, xor-shift). One changed word therefore always changes the
digest, words and blocks that change places do but for a chance below 2**-38 (measured for pairs of words that differ in
one bit, the worst case; 2**-64 for unlike words), and parts of a run can be summed in any
order, which is what lets many GPU threads share one run. It finds accidents; it is no defence against an adversary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Words: TypeAlias = NDArray[np.uint64]
Run: TypeAlias = bytes | bytearray | memoryview | NDArray[np.uint8]

POSITION = 0x9E3779B97F4A7C15
LENGTH = 0xD1B54A32D192ED03
FIRST = 0xFF51AFD7ED558CCD
SECOND = 0xC4CEB9FE1A85EC53
SHIFT = 33
WORD_BYTES = 8
_PART_WORDS = 1 << 14  # 128 KiB and as much again for temporaries: stays in a core's cache


def avalanche(words: Words) -> Words:
    """Mix every bit of each word into all others, in place; any shape."""
    shift = np.uint64(SHIFT)
    shifted = np.empty_like(words)
    for multiplier in (FIRST, SECOND):
        np.right_shift(words, shift, out=shifted)
        np.bitwise_xor(words, shifted, out=words)
        np.multiply(words, np.uint64(multiplier), out=words)
    np.right_shift(words, shift, out=shifted)
    np.bitwise_xor(words, shifted, out=words)
    return words


def finish(sums: Words, nbytes: NDArray[np.int64]) -> Words:
    """Digests of runs from the sums of their mixed words; both of shape [runs]."""
    lengths = (nbytes.astype(np.uint64) + np.uint64(1)) * np.uint64(LENGTH)
    return avalanche(sums + lengths)


def mix64_rows(rows: NDArray[np.uint8]) -> Words:
    """Digests of equally long runs: ``rows`` of shape [runs, bytes], the result of shape [runs]."""
    count, nbytes = rows.shape
    sums = np.zeros(count, np.uint64)
    together = max(1, _PART_WORDS * WORD_BYTES // max(1, nbytes))
    for start in range(0, count, together):
        sums[start : start + together] = _sums(rows[start : start + together])
    return finish(sums, np.full(count, nbytes, np.int64))


def mix64(view: Run) -> int:
    """The digest of one run: any contiguous buffer."""
    return int(mix64_rows(np.frombuffer(view, np.uint8).reshape(1, -1))[0])


def mix64_runs(views: Sequence[Run]) -> Words:
    """Digests of runs of any lengths; small equally long ones are worked on together."""
    digests = np.zeros(len(views), np.uint64)
    by_length: dict[int, list[int]] = {}
    runs = [np.frombuffer(view, np.uint8) for view in views]
    for index, run in enumerate(runs):
        by_length.setdefault(len(run), []).append(index)
    for nbytes, indices in by_length.items():
        together = max(1, _PART_WORDS * WORD_BYTES // max(1, nbytes))
        for start in range(0, len(indices), together):
            chosen = indices[start : start + together]
            rows = runs[chosen[0]].reshape(1, -1) if len(chosen) == 1 else np.stack([runs[index] for index in chosen])
            digests[chosen] = mix64_rows(rows)
    return digests


def _sums(rows: NDArray[np.uint8]) -> Words:
    """Sums of the mixed words of rows [runs, bytes], a part of the words at a time."""
    count, nbytes = rows.shape
    whole = nbytes // WORD_BYTES
    sums = np.zeros(count, np.uint64)
    for start in range(0, whole, _PART_WORDS):
        stop = min(whole, start + _PART_WORDS)
        words = np.ascontiguousarray(rows[:, start * WORD_BYTES : stop * WORD_BYTES]).view("<u8").astype(np.uint64)
        sums += _mixed(words, start)
    if nbytes % WORD_BYTES:
        tail = np.zeros((count, WORD_BYTES), np.uint8)
        tail[:, : nbytes % WORD_BYTES] = rows[:, whole * WORD_BYTES :]
        sums += _mixed(tail.view("<u8").astype(np.uint64), whole)
    return sums


def _mixed(words: Words, first: int) -> Words:
    """Sums over the last axis of words [runs, words] mixed with their positions, which begin at ``first``."""
    position = np.arange(first + 1, first + 1 + words.shape[1], dtype=np.uint64) * np.uint64(POSITION)
    np.bitwise_xor(words, position, out=words)
    total: Words = avalanche(words).sum(axis=1, dtype=np.uint64)
    return total
