"""Files that vLLM leaves behind when it is killed: shared memory it mapped, unix sockets it bound.

They are remembered by path and inode while their owners live, and unlinked after their death if the inode is still the
same and nobody else uses it; never by the look of a name.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from msgspec import Struct

from vllm_fleet.core import limits
from vllm_fleet.launcher.processes import ProcessId

SHARED_MEMORY = "/dev/shm/"


class Leftover(Struct, frozen=True):
    """One file, by identity."""

    path: str
    device: int
    inode: int


def collect(processes: Iterable[ProcessId]) -> set[Leftover]:
    """Shared memory these processes map or hold open and unix sockets they bound; at most LEFTOVERS_MAX."""
    found = _used_by(process.pid for process in processes)
    return set(sorted(found, key=lambda one: one.path)[: limits.LEFTOVERS_MAX])


def remove(leftovers: Collection[Leftover]) -> list[str]:
    """Unlink those that are still there, still the same file and used by no living process; their paths."""
    here = {one for one in leftovers if _identify(one.path) == one}
    removed: list[str] = []
    if not here:
        return removed
    used = _used_by(int(entry) for entry in os.listdir("/proc") if entry.isdecimal())
    for one in sorted(here - used, key=lambda each: each.path):
        with contextlib.suppress(OSError):
            os.unlink(one.path)
            removed.append(one.path)
    return removed


def _used_by(pids: Iterable[int]) -> set[Leftover]:
    paths: set[str] = set()
    sockets: set[int] = set()
    for pid in pids:
        paths.update(_mapped(pid))
        opened, inodes = _opened(pid)
        paths.update(opened)
        sockets.update(inodes)
    if sockets:
        paths.update(path for inode, path in _bound_sockets() if inode in sockets)
    return {one for one in map(_identify, paths) if one is not None}


def _identify(path: str) -> Leftover | None:
    """The file at ``path`` if it is our user's own and of a kind that processes leave behind."""
    if not path.isprintable():  # such a name could not be written to fleet.json
        return None
    try:
        found = os.lstat(path)
    except OSError:
        return None
    if found.st_uid != os.geteuid() or not (stat.S_ISREG(found.st_mode) or stat.S_ISSOCK(found.st_mode)):
        return None
    return Leftover(path, found.st_dev, found.st_ino)


def _mapped(pid: int) -> Iterator[str]:
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                at = line.find(" " + SHARED_MEMORY)
                if at >= 0 and not line.endswith(" (deleted)\n"):
                    yield line[at + 1 :].rstrip("\n")
    except OSError:
        return  # it ended, or is another user's


def _opened(pid: int) -> tuple[set[str], set[int]]:
    paths: set[str] = set()
    sockets: set[int] = set()
    folder = Path(f"/proc/{pid}/fd")
    try:
        entries = os.listdir(folder)
    except OSError:
        return paths, sockets
    for entry in entries:
        try:
            target = os.readlink(folder / entry)
        except OSError:
            continue
        if target.startswith(SHARED_MEMORY):
            paths.add(target)
        elif target.startswith("socket:["):
            sockets.add(int(target[8:-1]))
    return paths, sockets


def _bound_sockets() -> Iterator[tuple[int, str]]:
    try:
        lines = Path("/proc/net/unix").read_text(errors="surrogateescape").splitlines()[1:]
    except OSError:
        return
    for line in lines:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[7].startswith("/"):
            yield int(fields[6]), fields[7]
