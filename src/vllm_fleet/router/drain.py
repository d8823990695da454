"""A bounded queue into a thread: for what the event loop has to say to slow places, and must never wait for."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Drain(Generic[T]):
    """Hands items over to ``write``, in order, in batches, in a thread of its own. What does not fit is dropped and
    counted. ``put`` costs a fraction of a microsecond; ``write`` may take as long as it likes, and must not raise.
    """

    def __init__(self, name: str, write: Callable[[list[T]], None], items_max: int, pause_s: float) -> None:
        """``pause_s``: writes come no closer together than this."""
        self._write, self._items_max, self._pause_s = write, items_max, pause_s
        self._queue: deque[T] = deque()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._ended = threading.Event()
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Items not taken yet."""
        return len(self._queue)

    def put(self, item: T) -> None:
        """Take ``item``, or drop it where too many wait."""
        if len(self._queue) >= self._items_max:
            self.dropped += 1
            return
        self._queue.append(item)
        if not self._wake.is_set():
            self._wake.set()

    def nudge(self) -> None:
        """Let ``write`` be called soon, with nothing if nothing waits."""
        self._wake.set()

    def close(self, seconds: float) -> bool:
        """Take no more; whether all was written within ``seconds``. What was not is lost, and counted."""
        self._items_max = 0
        self._closing.set()
        self._wake.set()
        done = self._ended.wait(seconds)
        if not done:
            self.dropped += len(self._queue)
        return done

    def _run(self) -> None:
        last = float("-inf")
        while True:
            self._wake.wait()
            self._closing.wait(max(0.0, last + self._pause_s - time.monotonic()))
            self._wake.clear()
            closing = self._closing.is_set()  # before looking: nothing is put after it was set
            batch = [self._queue.popleft() for _ in range(len(self._queue))]
            last = time.monotonic()
            self._write(batch)
            if closing:
                self._ended.set()
                return
