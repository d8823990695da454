"""What waits for a peer's thread: loads asked for, transfers to give up, and what came over its connection."""

from __future__ import annotations

import queue
import time
from dataclasses import dataclass
from typing import TypeAlias

from vllm_fleet.connector.dial import Connection, Updates
from vllm_fleet.connector.intake import Job


@dataclass(frozen=True)
class Release:
    """Give a transfer up, or look again at a load of it that was cancelled."""

    transfer: str
    reader: int = 0


@dataclass(frozen=True)
class Heard:
    """What came over a connection; ``updates`` is None when it ended."""

    connection: Connection
    updates: Updates | None


Item: TypeAlias = Job | Release | Heard


class Inbox:
    """A queue that is taken whole."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Item | None] = queue.SimpleQueue()

    def put(self, item: Item) -> None:
        """Add one."""
        self._queue.put(item)

    def wake(self) -> None:
        """Let take() return, though there may be nothing."""
        self._queue.put(None)

    def take(self, until: float | None) -> list[Item]:
        """Everything there is; waits for the first until ``until`` on the monotonic clock."""
        try:
            item = self._queue.get(timeout=None if until is None else max(0.0, until - time.monotonic()))
        except queue.Empty:
            return []
        return [*([item] if item is not None else ()), *self.left()]

    def left(self) -> list[Item]:
        """Everything there is now."""
        taken: list[Item] = []
        while True:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return taken
            if item is not None:
                taken.append(item)
