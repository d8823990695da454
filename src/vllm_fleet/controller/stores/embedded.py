"""The journal as one file of this host: ``STATE_DIR/journal``, locked by ``STATE_DIR/lock``.

``STATE_DIR/mark`` says how far the journal has come. It is written after it and not fsynced: it may lag behind after a
crash of the machine, and is never ahead of what was acknowledged.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from vllm_fleet.controller.journal import NO_MARK, Loaded, Mark, Record, decode_records, encode_records
from vllm_fleet.controller.state import Entry
from vllm_fleet.controller.stores.contract import StoreFailed
from vllm_fleet.core.errors import ConfigError

FILE_MODE = 0o600
MARK_BYTES_MAX = 4096

_decode_mark = msgspec.json.Decoder(Mark).decode


class EmbeddedStore:
    """See contract.Store. Each append is fsynced; a rewrite goes to a new file that then takes the journal's name."""

    def __init__(self, state_dir: Path) -> None:
        """Take the lock of ``state_dir``, which is made when absent.

        Raises:
            ConfigError: it cannot be made or written, or another controller holds it (its pid is named).
        """
        self._path = state_dir / "journal"
        self._file = self._mark_file = -1
        self._mark = NO_MARK
        self._appended_bytes = 0
        try:
            state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        except OSError as error:
            raise ConfigError(f"state_dir: cannot use {state_dir}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._lock, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self._lock)
            self._lock = -1
            raise ConfigError(
                f"state_dir: {state_dir} is used by another controller, process {holder}; "
                "stop it or choose another folder"
            ) from error
        with contextlib.suppress(OSError):  # a full disk: the lock holds, only its message will not name us
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
        with contextlib.suppress(OSError):  # without it an older copy of the journal is not noticed
            self._mark_file = os.open(state_dir / "mark", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)

    @property
    def appended_bytes(self) -> int:
        return self._appended_bytes

    def load(self) -> Loaded:
        """See contract.Store; ConfigError when the file is there but cannot be read."""
        try:
            journal = self._path.read_bytes()
            if self._file < 0 and journal:
                self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        except FileNotFoundError:
            journal = b""
        except OSError as error:
            raise ConfigError(f"state_dir: cannot read {self._path}: {error.strerror}") from error
        self._mark = self._noted()
        loaded = decode_records(journal).compared(self._mark)
        if loaded.ahead is None:  # the last change may have been saved, and its process died before it noted that
            self._note(NO_MARK.after(loaded.records))
        return loaded

    def append(self, entries: Sequence[Entry]) -> None:
        written = encode_records(entries)
        try:
            write_all(self._file, written)
            os.fsync(self._file)
        except OSError as error:
            raise StoreFailed(f"cannot write {self._path}: {error.strerror}") from error
        self._appended_bytes += len(written)
        self._note(self._mark.after(entries))

    def rewrite(self, records: Sequence[Record]) -> None:
        fresh = self._path.with_suffix(".new")
        opened = -1
        try:
            opened = os.open(fresh, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, FILE_MODE)
            write_all(opened, encode_records(records))
            os.fsync(opened)
            fresh.rename(self._path)
            sync_folder(self._path.parent)
        except OSError as error:
            if opened >= 0:
                os.close(opened)
            with contextlib.suppress(OSError):
                fresh.unlink()
            raise StoreFailed(f"cannot write {fresh}: {error.strerror}") from error
        if self._file >= 0:
            os.close(self._file)
        self._file = opened
        self._appended_bytes = 0
        self._note(NO_MARK.after(records))

    def close(self) -> None:
        for opened in (self._file, self._mark_file, self._lock):
            if opened >= 0:
                os.close(opened)
        self._file = self._mark_file = self._lock = -1

    def _noted(self) -> Mark:
        try:
            return _decode_mark(os.pread(self._mark_file, MARK_BYTES_MAX, 0).partition(b"\n")[0])
        except (OSError, ValueError):
            return NO_MARK

    def _note(self, mark: Mark) -> None:
        self._mark = mark
        with contextlib.suppress(OSError):
            os.pwrite(self._mark_file, msgspec.json.encode(mark) + b"\n", 0)


def write_all(opened: int, written: bytes) -> None:
    """Write all of ``written``; OSError when the disk takes only a part of it."""
    view = memoryview(written)
    while view:
        view = view[os.write(opened, view) :]


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a crash of the machine."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
