"""Whether an instance gets requests, and how large a share: one breaker for each life of an instance. Pure.

closed ──a refused connection, IN_ROW failures in a row, or too large a share of them──> open
open ──its time is over──> half open: one request each BACKOFF_S is let through
half open ──it is answered──> closed, with a slow start;   ──it fails──> open, for twice as long
"""

from __future__ import annotations

from vllm_fleet.core import limits


class Breaker:
    """What one router saw of one instance. Times are seconds on the caller's clock."""

    __slots__ = (
        "_bad",
        "_good",
        "_in_row",
        "_opened",
        "_openings",
        "_probed",
        "_refused",
        "_until",
        "_warm",
        "_window",
    )

    def __init__(self) -> None:
        self._in_row = self._openings = self._good = self._bad = 0
        self._until = 0.0
        self._opened = self._refused = self._probed = False
        self._window = float("-inf")
        self._warm: float | None = None

    @property
    def closed(self) -> bool:
        """Whether nothing is held against the instance."""
        return not self._opened

    def allows(self, now: float) -> bool:
        """Whether a request may be sent there now."""
        return not self._opened or now >= self._until

    def begin(self, now: float) -> None:
        """A request is sent there; while half open it is the probe, and others wait until it has failed or is late."""
        if self._opened and now >= self._until:
            self._probed, self._until = True, now + limits.BACKOFF_S

    def leave_alone(self, until: float) -> None:
        """It asked to be left alone, without having failed."""
        self._opened = self._refused = True
        self._until = max(self._until, until)

    def succeeded(self, now: float) -> bool:
        """It answered. Returns whether that closed the breaker."""
        self._in_row = 0
        self._count(now, good=1)
        if not self._opened:
            return False
        if not (self._probed or self._refused):
            return False  # asked before it opened: says nothing about now
        self._opened = self._probed = self._refused = False
        self._openings, self._until = 0, 0.0
        self._good = self._bad = 0
        self.warm_up(now)
        return True

    def failed(self, now: float, *, refused: bool = False) -> bool:
        """It did not answer, or badly; ``refused``: not even a connection came up. Returns whether that opened it."""
        self._in_row += 1
        self._count(now, bad=1)
        if self._opened and now < self._until and not self._probed:
            return False  # one death fails many requests at once; it counts as one
        total = self._good + self._bad
        share = total >= limits.BREAKER_TRIES_MIN and self._bad >= limits.BREAKER_SHARE * total
        if not (refused or self._opened or share or self._in_row >= limits.BREAKER_IN_ROW):
            return False
        self._until = now + min(limits.BACKOFF_S * 2.0 ** min(self._openings, 16), limits.BACKOFF_MAX_S)
        self._openings += 1
        self._opened, self._probed, self._refused = True, False, refused
        self._warm = None
        return True

    def warm_up(self, now: float) -> None:
        """It is new, or back: its share of requests grows from now on."""
        self._warm = now

    def share(self, now: float) -> float:
        """Its part of what it would get otherwise, from SLOW_START_SHARE_MIN to 1."""
        if self._warm is None:
            return 1.0
        share = (now - self._warm) / limits.SLOW_START_S
        if share >= 1.0:
            self._warm = None
            return 1.0
        return max(share, limits.SLOW_START_SHARE_MIN)

    def _count(self, now: float, good: int = 0, bad: int = 0) -> None:
        if now - self._window >= limits.BREAKER_WINDOW_S:
            self._window, self._good, self._bad = now, 0, 0
        self._good += good
        self._bad += bad
