"""Those who follow the fleet: each has a bounded queue of lines to send; one that does not keep up is cut off."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from vllm_fleet.controller.state import FleetState
from vllm_fleet.core import limits, log
from vllm_fleet.core.errors import Busy
from vllm_fleet.wire.control import Change, Snapshot, encode


def encode_line(event: Snapshot | Change) -> bytes:
    """One line of a watch stream."""
    return encode(event) + b"\n"


def first_events(state: FleetState, since: int | None, controller: str | None) -> Sequence[Snapshot | Change]:
    """What a new watcher gets: the changes it missed, or everything."""
    changes = None if since is None else state.changes_since(since, controller)
    return (state.snapshot(),) if changes is None else changes


class Watcher:
    """One open watch stream. ``cut`` breaks its connection at once, even while a write to it waits."""

    def __init__(self, cut: Callable[[], None]) -> None:
        self.cut = cut
        self._lines: asyncio.Queue[bytes | None] = asyncio.Queue(limits.WATCH_QUEUE_MAX)

    def offer(self, line: bytes | None) -> bool:
        """Queue a line; None ends the stream. False when there was no room: the watcher is cut off."""
        try:
            self._lines.put_nowait(line)
        except asyncio.QueueFull:
            self.cut()
            return False
        return True

    async def next(self, wait_s: float) -> bytes | None:
        """The next line, None at the end. Raises TimeoutError when there is none for ``wait_s``."""
        async with asyncio.timeout(wait_s):
            return await self._lines.get()


class Watchers:
    """All open watch streams."""

    def __init__(self) -> None:
        self._open: set[Watcher] = set()
        self._ended = False

    def __len__(self) -> int:
        return len(self._open)

    def add(self, watcher: Watcher) -> None:
        """Tell ``watcher`` of all that is published from now on. Raises Busy at the limit and when stopping."""
        if self._ended:
            raise Busy("the controller is stopping")
        if len(self._open) >= limits.WATCHERS_MAX:
            raise Busy(f"{limits.WATCHERS_MAX} watchers are connected, the most there may be")
        self._open.add(watcher)

    def discard(self, watcher: Watcher) -> None:
        self._open.discard(watcher)

    def publish(self, event: Snapshot | Change) -> None:
        """Queue ``event`` for everybody."""
        if not self._open:
            return
        line = encode_line(event)
        for watcher in list(self._open):
            self._offer(watcher, line)

    def end(self) -> None:
        """End every stream after what is queued; later ones are refused."""
        self._ended = True
        for watcher in list(self._open):
            self._offer(watcher, None)

    def _offer(self, watcher: Watcher, line: bytes | None) -> None:
        if not watcher.offer(line):
            self._open.discard(watcher)
            log.warn("watcher.slow", queue_len=limits.WATCH_QUEUE_MAX)
