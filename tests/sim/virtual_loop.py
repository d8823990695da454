"""An asyncio event loop whose time is simulated: it jumps to the next timer, and nothing else can happen."""

from __future__ import annotations

import asyncio
from typing import Any


class Stuck(Exception):
    """Everybody waits, and for nothing that could come."""


class _Jumping:
    """A selector without files: waiting is moving the clock."""

    def __init__(self) -> None:
        self.now = 0.0

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise Stuck(f"nothing is left to happen at {self.now:.3f} s")
        self.now += timeout
        return []

    def close(self) -> None:
        pass


class VirtualLoop(asyncio.BaseEventLoop):
    """Runs the real code against a simulated world: same order of events for the same seed, hours in seconds."""

    def __init__(self) -> None:
        super().__init__()
        self._selector = _Jumping()

    def time(self) -> float:
        return self._selector.now

    def _process_events(self, events: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass
