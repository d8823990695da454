"""Logs of children: the few lines that say why one died, and following one as it grows. Reading only."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from vllm_fleet.core import limits

_PREFIX = re.compile(
    r"^(?:\x1b\[[0-9;]*m)*(?:\([\w-]+ pid=\d+\)(?:\x1b\[[0-9;]*m)* ?)?"
    r"(?:(?P<level>ERROR|CRITICAL|WARNING|INFO|DEBUG) [\d-]+ [\d:.]+ \[[^\]]*\] ?)?"
)
_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(?:Error|Exception|Exit|Interrupt|Failure|Timeout|NotFound)\b(?::|$)")
_COMPLAINT = re.compile(r"(?:\berror: |\bfatal\b|\bKilled\b|Segmentation fault|core dumped)", re.IGNORECASE)
_PORT_TAKEN = re.compile(r"address already in use|EADDRINUSE|port \d+ on \S+ is taken", re.IGNORECASE)
_CONTINUATION_MAX = 6
_LAST_LINES = 12


def tail(file: Path) -> list[str]:
    """The last lines of a log, as many as fit in LOG_TAIL_BYTES; none when there is no such file."""
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - limits.LOG_TAIL_BYTES))
            return stream.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def why(lines: Iterable[str]) -> list[str]:
    """The lines that say why a process died: the ends of its tracebacks, else its errors, else its last words.

    The first traceback comes first: what follows it is usually a consequence. At most LOG_TAIL_LINES.
    """
    split = [_split(line) for line in lines]
    picked = _traceback_ends([text for _, text in split])
    if not picked:
        picked = [text for level, text in split if level in ("ERROR", "CRITICAL") or _COMPLAINT.search(text)]
        picked = [text for text in picked if text.strip()]
    if not picked:
        picked = [text for _, text in split if text.strip()][-_LAST_LINES:]
    return picked[: limits.LOG_TAIL_LINES]


def summary(picked: Iterable[str]) -> str:
    """The line among ``why``'s that says most: the first exception, else the first complaint, else the last."""
    lines = [line.strip() for line in picked]
    for wanted in (_EXCEPTION, _COMPLAINT):
        for line in lines:
            if wanted.search(line):
                return line
    return lines[-1] if lines else ""


def port_taken(lines: Iterable[str]) -> bool:
    """Whether these lines of a dead process say that its port was taken."""
    return any(_PORT_TAKEN.search(line) for line in lines)


def _split(line: str) -> tuple[str, str]:
    found = _PREFIX.match(line)
    assert found is not None, "every part of the prefix is optional"
    return found["level"] or "", line[found.end() :].rstrip()


def _traceback_ends(lines: list[str]) -> list[str]:
    picked: list[str] = []
    seen: set[str] = set()
    frame: list[str] = []
    inside = False
    for at, line in enumerate(lines):
        if line.startswith("Traceback (most recent call last)"):
            inside, frame = True, []
        elif inside and line.startswith("  File "):
            frame = [line]
        elif inside and line.startswith("    ") and len(frame) == 1:
            frame.append(line)
        elif _EXCEPTION.match(line):
            if line not in seen:
                seen.add(line)
                picked += [*frame, line, *_continuation(lines[at + 1 :])]
            inside, frame = False, []
    return picked


def _continuation(lines: list[str]) -> list[str]:
    """The further lines of an exception's message: indented ones, right after it."""
    more: list[str] = []
    for line in lines[:_CONTINUATION_MAX]:
        if not line.startswith("  ") or line.startswith("  File "):
            break
        more.append(line)
    return more


class Follower:
    """Gives the whole lines a growing file has gained since the last call."""

    def __init__(self, file: Path, *, from_end: bool = False) -> None:
        self._file = file
        self._inode = 0
        self._at = 0
        self._rest = b""
        if from_end and file.exists():
            found = file.stat()
            self._at, self._inode = found.st_size, found.st_ino

    def lines(self) -> list[str]:
        """New lines; at most LOG_FOLLOW_BYTES of them per call."""
        try:
            with self._file.open("rb") as stream:
                inode = self._file.stat().st_ino
                if inode != self._inode:  # a new log took the old one's place
                    self._inode, self._at, self._rest = inode, 0, b""
                stream.seek(self._at)
                read = stream.read(limits.LOG_FOLLOW_BYTES)
        except OSError:
            return []
        self._at += len(read)
        *whole, self._rest = (self._rest + read).split(b"\n")
        if len(self._rest) > limits.LOG_FOLLOW_BYTES:  # a line without an end is shown in pieces
            whole.append(self._rest)
            self._rest = b""
        return [line.decode(errors="replace") for line in whole]

    def rest(self) -> str:
        """The last line so far, if it has no end yet."""
        return self._rest.decode(errors="replace")
