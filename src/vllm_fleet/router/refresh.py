"""Files that may be replaced while the router runs: looked at once a second, read again when they changed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_fleet.core import limits, log
from vllm_fleet.core.errors import ConfigError

_Stamp = tuple[tuple[int, int, int] | None, ...]


@dataclass(frozen=True, slots=True)
class Refresh:
    """What to do when one of ``paths`` changed."""

    setting: str
    paths: Sequence[str]
    read: Callable[[], Callable[[], None]]
    """Reads them, outside the event loop; what it returns takes the result over, inside. Raises ConfigError."""


class Refresher:
    """Looks at files. A change that cannot be read is logged once, and what was read before stays in use."""

    def __init__(self, refreshes: Sequence[Refresh]) -> None:
        """Reads each for the first time, here and now.

        Raises:
            ConfigError: one cannot be read.
        """
        self._seen = []
        for each in refreshes:
            stamp = _stamp(each.paths)  # before reading: a change in between is one more change
            each.read()()
            self._seen.append((each, stamp))

    async def run(self) -> None:
        """Look each FILES_CHECK_S until cancelled; returns at once where there is nothing to look at."""
        while self._seen:
            await asyncio.sleep(limits.FILES_CHECK_S)
            await self.look()

    async def look(self) -> None:
        """Read what changed since the last time."""
        for at, (each, before) in enumerate(self._seen):
            # In a thread: a network file system that hangs must not hang the requests.
            changed = await asyncio.to_thread(_changed, each, before)
            if changed is None:
                continue
            stamp, found = changed
            self._seen[at] = (each, stamp)
            if isinstance(found, ConfigError):
                log.warn("file.refused", setting=each.setting, reason=str(found))
            else:
                found()
                log.event("file.reread", setting=each.setting)


def _changed(each: Refresh, before: _Stamp) -> tuple[_Stamp, Callable[[], None] | ConfigError] | None:
    stamp = _stamp(each.paths)
    if stamp == before:
        return None
    try:
        return stamp, each.read()
    except ConfigError as error:
        return stamp, error


def _stamp(paths: Sequence[str]) -> _Stamp:
    """Another one whenever a file was replaced, written to or given another mode. A certificate's files are links to
    links (Let's Encrypt, Kubernetes): what counts is where they lead.
    """
    return tuple(_file_stamp(path) for path in paths)


def _file_stamp(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_ino, found.st_size, found.st_ctime_ns)
