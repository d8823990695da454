"""Time, randomness and ids, passed in, so that a simulation can replace them."""

from __future__ import annotations

import random
import secrets
import time
from typing import Protocol


class Env(Protocol):
    """What decisions may ask of the world."""

    rng: random.Random

    def now(self) -> float:
        """Seconds on a monotonic clock; for durations."""
        ...

    def wall(self) -> float:
        """Seconds since 1970; for display only."""
        ...

    def new_id(self) -> str:
        """A fresh unguessable id: 32 hexadecimal digits."""
        ...


class RealEnv:
    """The process's own clock and random source."""

    def __init__(self) -> None:
        self.rng = random.Random()

    def now(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()

    def new_id(self) -> str:
        return secrets.token_hex(16)
