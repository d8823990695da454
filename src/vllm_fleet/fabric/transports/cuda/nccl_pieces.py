"""How one question of the nccl transport is cut into messages. Pure arithmetic; both sides come to the same sizes.

Each message costs the host some 20 us on either side (a launch, a call of NCCL, events), in which the wire moves 7 MiB,
and more while the thread is cold: so few messages, all alike. Short ones at both ends, for a wire that starts sooner
and a last scatter that ends sooner, gained nothing (2 x H200).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from vllm_fleet.fabric.plan import Ints
from vllm_fleet.fabric.transports.cuda.pieces import ALIGNMENT, Pieces, cut

HALVED_BYTES = 8 << 20
"""More than this goes in two messages at least: one is copied while the other moves."""


def message_sizes(total: int, chunk_bytes: int) -> list[int]:
    """Bytes of each message of one question."""
    half = -(-total // (2 * ALIGNMENT)) * ALIGNMENT
    return _even(total, min(chunk_bytes, half) if total > HALVED_BYTES else chunk_bytes)


def _even(total: int, most: int) -> list[int]:
    """Sizes of ``most`` bytes at most, as few and as equal as their alignment allows; the last may be shorter."""
    if total <= 0:
        return []
    count = -(-total // most)
    size = min(most, -(-total // count // ALIGNMENT) * ALIGNMENT)
    whole, rest = divmod(total, size)
    return [size] * whole + [rest] * (rest > 0)


def lead_and_rest(address: Ints, nbytes: Ints, sizes: list[int], row_bytes_max: int) -> Iterator[Pieces]:
    """The first piece alone, which can then be on its way while all others are cut; together they have ``sizes``.

    Arrays of shape [runs], lengths above 0.
    """
    if len(sizes) < 2:
        yield pieces_of(address, nbytes, sizes, row_bytes_max)
        return
    if each := _equal_rows(nbytes, sizes, row_bytes_max):
        count = sizes[0] // each
        yield _counted(address[:count], nbytes[:count], sizes[:1], each)
        yield _counted(address[count:], nbytes[count:], sizes[1:], each)
        return
    ends = np.cumsum(nbytes)
    run = int(np.searchsorted(ends, sizes[0]))  # the run that holds the last byte of the first piece
    rest = int(ends[run]) - sizes[0]  # of that run, for the second piece
    lead = nbytes[: run + 1].copy()
    lead[-1] -= rest
    yield cut(address[: run + 1], lead, sizes[:1], row_bytes_max)
    after = run if rest else run + 1
    address, nbytes = address[after:], nbytes[after:]
    if rest:
        address, nbytes = address.copy(), nbytes.copy()
        address[0] += nbytes[0] - rest
        nbytes[0] = rest
    yield cut(address, nbytes, sizes[1:], row_bytes_max)


def pieces_of(address: Ints, nbytes: Ints, sizes: list[int], row_bytes_max: int) -> Pieces:
    """Runs cut into pieces of the given sizes: arrays of shape [runs], lengths above 0."""
    if each := _equal_rows(nbytes, sizes, row_bytes_max):
        return _counted(address, nbytes, sizes, each)
    return cut(address, nbytes, sizes, row_bytes_max)


def _equal_rows(nbytes: Ints, sizes: list[int], row_bytes_max: int) -> int:
    """The length of runs that are equally long, good rows as they are, and never in two pieces; else 0.

    So are the usual blocks. A thread that has just been woken takes 4 us for each call of NumPy, not 1, and cut() makes
    30 of them.
    """
    each = int(nbytes[0]) if len(nbytes) else 0
    if not row_bytes_max // 2 <= each <= row_bytes_max or any(size % each for size in sizes[:-1]):
        return 0
    return each if bool((nbytes == each).all()) else 0


def _counted(address: Ints, nbytes: Ints, sizes: list[int], each: int) -> Pieces:
    """The pieces of runs of ``each`` bytes: rows are counted."""
    within = np.arange(0, len(address) * each, each)
    counts = [size // each for size in sizes]
    starts = np.array([0, *itertools.accumulate(counts)], np.int64)
    if len(sizes) > 1:
        within -= np.repeat(starts[:-1] * each, counts)
    return Pieces(address, within, nbytes, starts, sizes)
