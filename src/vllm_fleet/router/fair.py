"""A bounded queue with a fair turn for every caller: weighted round robin over their keys. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

from vllm_fleet.core import limits

T = TypeVar("T", bound=Hashable)

_OTHERS = "\0others"


class FairQueue(Generic[T]):
    """Items wait under their caller's key, each key in the order in which its items came.

    A key with weight 2 gets two items out for each one of a key with weight 1. When the queue is full, the newest item
    of the key with the most waiting gives way, which may be the newcomer: a caller that floods turns away itself.
    """

    def __init__(self, items_max: int, weights: Mapping[str, int] | None = None) -> None:
        """``weights``: by key, at least 1; keys not named have 1."""
        self._max, self._weights = items_max, weights or {}
        self._waiting: dict[str, deque[T]] = {}
        self._turns: deque[str] = deque()
        self._left = 0  # items that the key whose turn it is may still take
        self._len = 0

    def __len__(self) -> int:
        return self._len

    def put(self, key: str, item: T) -> T | None:
        """Add one. Returns who has to go for it: None when there was room, else an item, perhaps this very one."""
        if self._max <= 0:
            return item
        if key not in self._waiting and len(self._waiting) >= limits.QUEUE_KEYS_MAX:
            key = _OTHERS
        evicted: T | None = None
        if self._len >= self._max:
            longest = max(self._waiting, key=lambda one: len(self._waiting[one]))
            if len(self._waiting[longest]) <= len(self._waiting.get(key, ())) + 1:
                return item
            evicted = self._waiting[longest].pop()
            self._len -= 1
        if key not in self._waiting:
            self._waiting[key] = deque()
            self._turns.append(key)
        self._waiting[key].append(item)
        self._len += 1
        return evicted

    def pop(self) -> T | None:
        """The next item; None when nobody waits."""
        while self._turns:
            key = self._turns[0]
            if self._left <= 0:
                self._left = max(1, self._weights.get(key, 1))
            items = self._waiting[key]
            item = items.popleft() if items else None
            self._left -= 1
            if not items:
                del self._waiting[key]
                self._turns.popleft()
                self._left = 0
            elif self._left <= 0:
                self._turns.rotate(-1)
            if item is not None:
                self._len -= 1
                return item
        return None

    def remove(self, item: T) -> bool:
        """Take one out that waits no more. Returns whether it was there."""
        for items in self._waiting.values():
            if item in items:
                items.remove(item)  # an empty key goes when its turn comes
                self._len -= 1
                return True
        return False
