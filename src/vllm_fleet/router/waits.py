"""Waits that end a task's work when their time is over: deadlines, first bytes, stalls. One timer for all of them.

A timer for each request costs microseconds and is nearly never needed; here a wait costs two entries in a set, and is
looked at every WATCH_TURN_S.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from vllm_fleet.core import limits
from vllm_fleet.core.env import Env

NEVER = float("inf")


class Ended(Exception):
    """The time of a wait was over."""


class Wait:
    """Cancels the task that entered it at ``at``, or when told to; leaving it then raises ``Ended`` instead.

    Like asyncio.timeout: a cancellation by somebody else stays one, and what was raised inside otherwise wins.
    """

    __slots__ = ("_before", "_owner", "_task", "at", "fired")

    def __init__(self, owner: Waits, at: float = NEVER) -> None:
        self._owner, self._before = owner, 0
        self._task: asyncio.Task[object] | None = None
        self.at = at
        """When it ends, on Env's clock; may be moved at any time."""
        self.fired = False

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None, "waits belong to tasks"
        self._task, self._before = task, task.cancelling()
        self._owner.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._owner.discard(self)
        task, self._task = self._task, None
        if not self.fired or task is None:
            return
        others = task.uncancel() > self._before
        if kind is asyncio.CancelledError and not others:
            raise Ended from error

    def due(self, now: float) -> bool:
        """Its time is over. Returns whether it really is to end; a subclass may want to wait on, and moves ``at``."""
        return True

    def fire(self) -> None:
        """End it now."""
        if not self.fired and self._task is not None:
            self.fired = True
            self._task.cancel()


class Waits:
    """All waits of one event loop."""

    def __init__(self, env: Env) -> None:
        self._env = env
        self._all: dict[Wait, None] = {}  # in the order in which they came
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._all)

    def add(self, wait: Wait) -> None:
        """Look at it from now on."""
        self._all[wait] = None
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(limits.WATCH_TURN_S, self._turn)

    def discard(self, wait: Wait) -> None:
        """Look at it no more."""
        self._all.pop(wait, None)

    def all(self) -> list[Wait]:
        """All of them."""
        return list(self._all)

    def look(self) -> None:
        """End what is over."""
        now = self._env.now()
        for wait in [one for one in self._all if one.at <= now and not one.fired]:
            if wait.due(now):
                wait.fire()

    def _turn(self) -> None:
        self._timer = None
        self.look()
        if self._all:
            self._timer = asyncio.get_running_loop().call_later(limits.WATCH_TURN_S, self._turn)
