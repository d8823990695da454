"""Processes by identity: a pid and its start time, so that a reused pid is never signalled."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class ProcessId(NamedTuple):
    """One life of one process on this boot; ``start`` is in clock ticks since the boot, so no clock change moves it."""

    pid: int
    start: int


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the process table."""

    id: ProcessId
    parent: int
    session: int
    zombie: bool


def boot_id() -> str:
    """A random id of this boot: ProcessIds of another boot mean nothing."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def read(pid: int) -> Row | None:
    """The process's row, or None when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()  # the name before it may hold spaces and brackets
    return Row(ProcessId(pid, int(fields[19])), int(fields[1]), int(fields[3]), fields[0] in (b"Z", b"X"))


def identify(pid: int) -> ProcessId | None:
    """The identity of a running process; None for one that ended, also before its parent took notice."""
    row = read(pid)
    return None if row is None or row.zombie else row.id


def alive(process: ProcessId) -> bool:
    """Whether this very process still runs."""
    return identify(process.pid) == process


def table() -> list[Row]:
    """Every process visible here."""
    rows = (read(int(entry)) for entry in os.listdir("/proc") if entry.isdecimal())
    return [row for row in rows if row is not None]


def tree(leader: int, rows: Iterable[Row], known: Iterable[ProcessId] = ()) -> set[ProcessId]:
    """Running processes of the session that ``leader`` began, of ``known``, and all their descendants."""
    rows = list(rows)
    wanted = set(known)
    found = {row.id for row in rows if row.session == leader or row.id.pid == leader or row.id in wanted}
    grew = True
    while grew:
        pids = {each.pid for each in found}
        more = {row.id for row in rows if row.parent in pids} - found
        found |= more
        grew = bool(more)
    zombies = {row.id for row in rows if row.zombie}
    return found - zombies


def marked(name: str, value: str) -> set[ProcessId]:
    """Running processes that were started with this variable in their environment, by us or by one that was.

    It finds helpers that went away into sessions of their own and whose parents are gone. Other users' are not seen.
    """
    wanted, found = f"{name}={value}".encode(), set()
    for row in table():
        try:
            environ = Path(f"/proc/{row.id.pid}/environ").read_bytes()
        except OSError:
            continue
        if wanted in environ.split(b"\0") and not row.zombie:
            found.add(row.id)
    return found


def send(process: ProcessId, signum: int) -> bool:
    """Signal this very process; False when it is gone. Raises PermissionError when it is another user's."""
    try:
        handle = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        if identify(process.pid) != process:  # checked while the handle keeps the pid from being reused
            return False
        signal.pidfd_send_signal(handle, signum)
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)
    return True


def kill(processes: Iterable[ProcessId], wait_s: float) -> set[ProcessId]:
    """SIGKILL each and wait up to ``wait_s`` for their end; those that still run are returned."""
    left = {process for process in processes if send(process, signal.SIGKILL)}
    return wait(left, wait_s)


def wait(processes: Iterable[ProcessId], wait_s: float) -> set[ProcessId]:
    """Wait up to ``wait_s`` for their end; those that still run are returned."""
    until = time.monotonic() + wait_s
    left = {process for process in processes if alive(process)}
    while left and time.monotonic() < until:
        time.sleep(0.02)
        left = {process for process in left if alive(process)}
    return left
