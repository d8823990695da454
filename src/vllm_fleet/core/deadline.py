"""Deadlines travel, timeouts do not: one Deadline is made at the edge and passed down."""

from __future__ import annotations

import time
from dataclasses import dataclass

from vllm_fleet.core.errors import DeadlineExceeded


@dataclass(frozen=True, slots=True)
class Deadline:
    """A point on the monotonic clock, and the setting that chose it (named in errors)."""

    at: float
    setting: str
    began: float

    @classmethod
    def after(cls, seconds: float, setting: str) -> Deadline:
        """A deadline ``seconds`` from now; ``setting`` is the name a user would change to move it."""
        now = time.monotonic()
        return cls(at=now + seconds, setting=setting, began=now)

    def remaining(self) -> float:
        """Seconds left, at least 0."""
        return max(0.0, self.at - time.monotonic())

    def expired(self) -> bool:
        return time.monotonic() >= self.at

    def capped(self, seconds: float) -> Deadline:
        """The earlier of this deadline and ``seconds`` from now; never later than this one."""
        now = time.monotonic()
        return Deadline(at=min(self.at, now + seconds), setting=self.setting, began=now)

    def check(self, who: str, what: str) -> None:
        """Raise DeadlineExceeded, naming ``who`` and ``what``, when no time is left."""
        if self.expired():
            raise self.error(who, what)

    def error(self, who: str, what: str) -> DeadlineExceeded:
        return DeadlineExceeded(who, what, time.monotonic() - self.began, self.setting)
