"""Who may be worked on now, who waits for a turn, who is turned away. Pure: whoever waits is a handle of the caller's.

A request has a place from the time it is let in until it is over. Without a free place it waits in a fair queue; with
the queue full, somebody is turned away, and is told when to come again.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from typing import Generic, TypeVar

from vllm_fleet.core import limits
from vllm_fleet.router.fair import FairQueue

T = TypeVar("T", bound=Hashable)

_RATE_OF = 64  # ends of requests that the rate is taken from
_RETRY_AFTER_S_MAX = 60


class Admission(Generic[T]):
    """The places of one router."""

    def __init__(
        self, places: Callable[[float], int], queue_max: int, weights: Mapping[str, int] | None = None
    ) -> None:
        """``places``: how many requests may run at a time; it may change, with the number of instances."""
        self._places = places
        self._queue: FairQueue[T] = FairQueue(queue_max, weights)
        self._ended: deque[float] = deque(maxlen=_RATE_OF)
        self.running = 0

    @property
    def waiting(self) -> int:
        """Requests that wait for a turn."""
        return len(self._queue)

    def enter(self, now: float) -> bool:
        """Whether a request may begin at once; it then has a place."""
        if self._queue or self.running >= self._places(now):
            return False
        self.running += 1
        return True

    def wait(self, key: str, handle: T) -> T | None:
        """Wait for a turn. Returns who is turned away for it, if anybody: maybe this very handle."""
        return self._queue.put(key, handle)

    def give_up(self, handle: T) -> bool:
        """It waits no more. Returns whether it did until now; if not, it has a place, and must ``leave``."""
        return self._queue.remove(handle)

    def leave(self, now: float) -> None:
        """A request that had a place is over. ``next`` says whose turn it is."""
        assert self.running > 0, "a request left that never entered"
        self.running -= 1
        if self._queue:
            self._ended.append(now)

    def next(self, now: float) -> T | None:
        """Who has a place from now on; call it until it says None, after each end and when places were added."""
        if not self._queue or self.running >= self._places(now):
            return None
        handle = self._queue.pop()
        if handle is not None:
            self.running += 1
        return handle

    def retry_after_s(self, now: float) -> int:
        """When there may be a place for somebody who is turned away now: the queue's length by the recent rate."""
        if len(self._ended) < 2:
            return limits.RETRY_AFTER_S
        took_s = max(now - self._ended[0], 1e-3)
        wait_s = (len(self._queue) + 1) * took_s / len(self._ended)
        return max(limits.RETRY_AFTER_S, min(_RETRY_AFTER_S_MAX, math.ceil(wait_s)))
