"""How to drive a library that is polled: how many bytes to give it at once, and what to do between two polls."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from vllm_fleet.fabric.plan import Ints

PIECE_BYTES_MIN = 256 << 10
PIECE_BYTES_MAX = 64 << 20
_SHORT_S = 0.02
_LONG_S = 0.2
_SPIN_S = 50e-6
_SLEEP_S_MIN = 20e-6
_SLEEP_S_MAX = 500e-6


class Pacer:
    """The size of the next piece, from how long the last ones took: small on a slow path, so that a cancel need not
    wait long. For one thread."""

    def __init__(self) -> None:
        self.piece_bytes = PIECE_BYTES_MIN

    def took(self, nbytes: int, seconds: float) -> None:
        """Learn from a piece of ``nbytes``."""
        if seconds > _LONG_S:
            self.piece_bytes = max(self.piece_bytes // 2, PIECE_BYTES_MIN)
        elif seconds < _SHORT_S and nbytes >= self.piece_bytes // 2:
            self.piece_bytes = min(self.piece_bytes * 2, PIECE_BYTES_MAX)

    def pieces(self, nbytes: Ints, part: slice) -> Iterator[slice]:
        """Consecutive slices of ``part`` of the runs (lengths: array of shape [runs]); each is as large as is right
        when it is asked for, and has at least one run."""
        start, end = part.start, min(part.stop, len(nbytes))
        ends = np.cumsum(nbytes[start:end])
        at = 0
        while start + at < end:
            before = int(ends[at - 1]) if at else 0
            stop = max(int(np.searchsorted(ends, before + self.piece_bytes, side="right")), at + 1)
            yield slice(start + at, start + stop)
            at = stop


class Pause:
    """What to do between two polls: spin for a moment, then sleep longer and longer."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._sleep_s = 0.0

    def __call__(self) -> bool:
        """Wait a little; whether it was long enough to look at other things too."""
        if not self._sleep_s and time.monotonic() - self._began < _SPIN_S:
            return False
        self._sleep_s = min(max(self._sleep_s * 2, _SLEEP_S_MIN), _SLEEP_S_MAX)
        time.sleep(self._sleep_s)
        return self._sleep_s >= _SLEEP_S_MAX
