"""The access log: one JSON object a line, one line a request. Nothing of its body, and no key.

The event loop only puts a line's facts into a bounded queue; a thread makes text of them and writes it. A full disk or
a pipe that nobody reads costs lines, which are counted, and no request waits for it.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterable, Iterator

import msgspec
from msgspec import Struct

from vllm_fleet.core import limits, log
from vllm_fleet.core.errors import ConfigError
from vllm_fleet.router.drain import Drain

SETTING = "router.access_log"
STDOUT = "-"


class Line(Struct, omit_defaults=True):
    """One request that is over. What is not known of it, or nothing to tell, is left out."""

    id: str
    """Its X-Request-Id."""
    route: str
    status: int
    """What the client was told; 499: it hung up before."""
    seconds: float
    time: str = ""
    """When its answer was complete, UTC."""
    tenant: str = ""
    first_byte_s: float | None = None
    prefill: str | None = None
    decode: str | None = None
    outcome: str | None = None
    mode: str | None = None
    retries: int = 0
    resumes: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    trace: str | None = None


_encode = msgspec.json.Encoder().encode
_CHUNK_BYTES = 256 << 10
_PIPE_BYTES = 4096  # PIPE_BUF of Linux: as much as nobody else's writes can get in between


def utc(wall: float) -> str:
    """A time as ISO 8601, to the millisecond."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(wall))
    return f"{whole}.{int(wall % 1 * 1000):03d}Z"


class AccessLog:
    """Writes lines to a file, a pipe or standard output (``-``), which may be moved away or cut short meanwhile."""

    def __init__(self, path: str) -> None:
        """
        Raises:
            ConfigError: the file cannot be written.
        """
        self._path = path
        self._file: int | None = 1 if path == STDOUT else None
        self._torn = False
        self._written = 0
        self._reopen = False
        self._lost = 0
        self._warned = float("-inf")
        if path != STDOUT and not _is_fifo(path):  # opening a pipe waits for its reader: not here
            try:
                self._file = self._open()
            except OSError as error:
                raise ConfigError(f"{SETTING}: cannot write {path}: {error.strerror}") from error
        self._drain: Drain[tuple[float, Line]] = Drain(
            "fleet-access-log", self._write, limits.ACCESS_QUEUE_MAX, limits.ACCESS_BATCH_S
        )

    @property
    def dropped(self) -> int:
        """Lines nobody will read."""
        return self._drain.dropped + self._lost

    def put(self, line: Line, wall: float) -> None:
        """Write ``line`` soon; ``wall``: seconds since 1970."""
        self._drain.put((wall, line))

    def reopen(self) -> None:
        """The file was moved away: go on with a new one of its name."""
        self._reopen = True
        self._drain.nudge()

    def close(self) -> None:
        """Write what waits, within ACCESS_STOP_S."""
        if self._drain.close(limits.ACCESS_STOP_S) and self._file not in (None, 1):
            os.close(self._file or 0)
            self._file = None

    # In the thread -------------------------------------------------------------------------------------------------

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def _write(self, batch: list[tuple[float, Line]]) -> None:
        try:
            if self._reopen and self._path != STDOUT:
                self._reopen, before = False, self._file
                self._file = None
                if before is not None:
                    os.close(before)
            if self._file is None:
                self._file = self._open()
            regular = stat.S_ISREG(os.fstat(self._file).st_mode)
        except OSError as error:
            self._gone(len(batch), error)
            return
        left = len(batch)
        # One write for many lines, but no more than is written whole: several routers may share the file or the pipe.
        chunk_max = _CHUNK_BYTES if regular else _PIPE_BYTES
        for chunk in _chunks((_text(wall, line) for wall, line in batch), chunk_max):
            try:
                self._put(chunk, self._file)
            except OSError as error:
                self._gone(left - chunk[: self._written].count(b"\n"), error)
                return
            left -= chunk.count(b"\n")

    def _put(self, text: bytes, file: int) -> None:
        """All of it, however often that takes. If it fails within a line, what follows begins on a line of its own."""
        self._written = 0
        if self._torn:
            os.write(file, b"\n")
            self._torn = False
        try:
            while self._written < len(text):
                self._written += os.write(file, memoryview(text)[self._written :])
        finally:
            self._torn = 0 < self._written < len(text) and text[self._written - 1 : self._written] != b"\n"

    def _gone(self, lines: int, error: OSError) -> None:
        self._lost += lines
        if error.errno in (errno.EPIPE, errno.EBADF, errno.EIO) and self._file not in (None, 1):
            os.close(self._file or 0)
            self._file = None  # another reader may come; opening waits for it
        now = time.monotonic()
        if now - self._warned >= limits.WARN_EVERY_S:
            self._warned = now
            log.warn("access_log.failed", path=self._path, reason=error.strerror or str(error), lost=self._lost)


def _text(wall: float, line: Line) -> bytes:
    line.time, line.seconds = utc(wall), round(line.seconds, 6)
    if line.first_byte_s is not None:
        line.first_byte_s = round(line.first_byte_s, 6)
    return _encode(line) + b"\n"


def _chunks(lines: Iterable[bytes], bytes_max: int) -> Iterator[bytes]:
    """The lines, joined as long as they fit; a longer one stands alone."""
    kept = bytearray()
    for line in lines:
        if kept and len(kept) + len(line) > bytes_max:
            yield bytes(kept)
            kept.clear()
        kept += line
    if kept:
        yield bytes(kept)


def _is_fifo(path: str) -> bool:
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except OSError:
        return False
