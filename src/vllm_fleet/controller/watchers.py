"""Those who follow the fleet. Lines that one cannot take yet wait, up to a bound; one that falls behind is cut off.

No sockets and no clock: a watcher writes to the outlet that the HTTP layer gives it, and is told the time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from vllm_fleet.controller.state import FleetState
from vllm_fleet.core import limits, log
from vllm_fleet.core.errors import Busy
from vllm_fleet.net.http.messages import Outlet
from vllm_fleet.wire.control import News, StillHere, encode


def encode_line(event: News | StillHere) -> bytes:
    """One line of a watch stream."""
    return encode(event) + b"\n"


def first_events(state: FleetState, since: int | None, controller: str | None) -> Sequence[News]:
    """What a new watcher gets: the changes it missed, or everything."""
    changes = None if since is None else state.changes_since(since, controller)
    return (state.snapshot(),) if changes is None else changes


class Watcher:
    """One open watch stream: a Feed. ``first``: what it begins with."""

    content_type = "application/x-ndjson"

    def __init__(self, first: bytes, left: Callable[[Watcher], None]) -> None:
        self._waiting: deque[bytes] = deque([first])
        self._left = left
        self._outlet: Outlet | None = None
        self._room = False
        self._ending = False
        self._spoke = True
        self._spoke_at = 0.0

    def offer(self, line: bytes) -> bool:
        """Send a line, or let it wait. False when too many wait: the watcher is cut off."""
        self._spoke = True
        if self._room and self._outlet is not None:
            self._room = self._outlet.write(line)
            return True
        if len(self._waiting) >= limits.WATCH_QUEUE_MAX:
            self.cut()
            return False
        self._waiting.append(line)
        return True

    def end(self) -> None:
        """End the stream, after what waits."""
        self._ending = True
        self._send_waiting()

    def cut(self) -> None:
        """Break the connection at once."""
        if self._outlet is not None:
            self._outlet.cut()

    def is_silent(self, now: float, longer_than_s: float) -> bool:
        """Whether nothing was sent for so long, as far as can be told from being asked now and then."""
        if self._spoke:
            self._spoke, self._spoke_at = False, now
        return now - self._spoke_at >= longer_than_s

    def on_open(self, outlet: Outlet) -> None:
        self._outlet = outlet
        self.on_room()

    def on_room(self) -> None:
        self._room = True
        self._send_waiting()

    def on_closed(self) -> None:
        self._outlet, self._room = None, False
        self._left(self)

    def _send_waiting(self) -> None:
        if self._outlet is None:
            return
        while self._waiting and self._room:
            self._room = self._outlet.write(self._waiting.popleft())
        if self._ending and not self._waiting:
            self._outlet.end()


class Watchers:
    """All open watch streams."""

    def __init__(self) -> None:
        self._open: set[Watcher] = set()
        self._ended = False

    def __len__(self) -> int:
        return len(self._open)

    def add(self, first: bytes) -> Watcher:
        """A new watcher, who is told ``first`` and all that is published from now on.

        Raises Busy at the limit and when stopping.
        """
        if self._ended:
            raise Busy("the controller is stopping")
        if len(self._open) >= limits.WATCHERS_MAX:
            raise Busy(f"{limits.WATCHERS_MAX} watchers are connected, the most there may be")
        watcher = Watcher(first, self._open.discard)
        self._open.add(watcher)
        return watcher

    def publish(self, event: News) -> None:
        """Tell everybody."""
        if not self._open:
            return
        line = encode_line(event)
        for watcher in list(self._open):
            self._offer(watcher, line)

    def reassure(self, revision: int, now: float, longer_than_s: float) -> None:
        """Tell those who have heard nothing for ``longer_than_s`` that the stream lives."""
        line = encode_line(StillHere(revision))
        for watcher in [one for one in self._open if one.is_silent(now, longer_than_s)]:
            self._offer(watcher, line)

    def end(self) -> None:
        """End every stream after what is queued; later ones are refused."""
        self._ended = True
        self.dismiss()

    def dismiss(self) -> None:
        """End every stream after what is queued; who watched may come again."""
        for watcher in list(self._open):
            watcher.end()

    def _offer(self, watcher: Watcher, line: bytes) -> None:
        if not watcher.offer(line):
            self._open.discard(watcher)
            log.warn("watcher.slow", queue_len=limits.WATCH_QUEUE_MAX)
