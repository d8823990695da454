"""How one question of the nccl transport is cut into messages. Pure arithmetic; both sides come to the same sizes.

Each message costs the host some 35 us on either side (a launch, a call of NCCL, events), in which the wire moves
13 MiB: so few messages, and of these only the first and the last ones short.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vllm_fleet.fabric.plan import Ints
from vllm_fleet.fabric.transports.cuda.pieces import ALIGNMENT, Pieces, cut

FIRST_BYTES = (8 << 20,)
"""The first messages of a transfer: the wire waits for the first gather."""
LAST_BYTES = (8 << 20, 4 << 20)
"""The last ones: the last scatter comes after all else."""


def message_sizes(total: int, chunk_bytes: int, *, first: bool, last: bool) -> list[int]:
    """Bytes of each message of one question, the ``first`` or ``last`` of its transfer or both."""
    up, down = (FIRST_BYTES if first else ()), (LAST_BYTES if last else ())
    steps = [step for step in (*up, *down) if step < chunk_bytes]
    if sum(steps) + chunk_bytes > total:  # too little for a ramp: halves, so that one is copied while the other moves
        parts = 2 if total > 2 * LAST_BYTES[-1] else 1
        return _even(total, min(chunk_bytes, -(-total // parts)))
    middle = _even(total - sum(steps), chunk_bytes)
    return [size for size in up if size < chunk_bytes] + middle + [size for size in down if size < chunk_bytes]


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
        yield cut(address, nbytes, sizes, row_bytes_max)
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
