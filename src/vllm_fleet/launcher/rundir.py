"""The run folder of one fleet: token, settings, logs and the record of what runs. One supervisor at a time owns it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from vllm_fleet.core import limits
from vllm_fleet.core.errors import Busy, FleetError

HOME_VARIABLE = "VLLM_FLEET_HOME"
_IPC_NAME_LEN = 37  # vLLM's ipc sockets: '/' and a uuid
_LOCK_TRIES = 5


def home(environ: Mapping[str, str]) -> Path:
    """Where the run folders are: $VLLM_FLEET_HOME, $XDG_STATE_HOME/vllm-fleet or ~/.local/state/vllm-fleet."""
    own, state = environ.get(HOME_VARIABLE), environ.get("XDG_STATE_HOME")
    if own:
        return Path(own).expanduser().absolute()
    if state and os.path.isabs(state):
        return Path(state) / "vllm-fleet"
    return Path(environ.get("HOME") or Path.home()) / ".local" / "state" / "vllm-fleet"


class RunDir:
    """Paths of one fleet's run folder, and its lock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.token_file = folder / "token"
        self.record_file = folder / "fleet.json"
        self.lock_file = folder / "lock"
        self.settings_folder = folder / "settings"
        self.logs_folder = folder / "logs"
        self.state_folder = folder / "state"
        self.tmp_folder = folder / "tmp"
        self._lock: int | None = None

    def log_file(self, name: str) -> Path:
        """Where the process of this name writes what it says."""
        return self.logs_folder / f"{name}.log"

    def acquire(self) -> None:
        """Become the one supervisor of this folder, until ``release`` or the end of this process.

        Raises:
            Busy: another supervisor holds it; names its pid and the folder.
            FleetError: the folder cannot be made.
        """
        try:
            for folder in (self.folder, self.logs_folder):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.chmod(self.folder, 0o700)
            lock = os.open(self.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise FleetError(f"cannot make the run folder {self.folder}: {error.strerror}") from error
        if not _lock(lock):
            holder = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(lock)
            raise Busy(
                f"a fleet named '{self.folder.name}' runs already: pid {holder}, run folder {self.folder}; "
                f"stop it with: vllm-fleet down --name {self.folder.name}"
            )
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        self._lock = lock

    def release(self) -> None:
        """Let another supervisor have the folder. Safe to call twice."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def held(self) -> bool:
        """Whether a supervisor (this process included) owns the folder now."""
        if self._lock is not None:
            return True
        try:
            lock = os.open(self.lock_file, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
        return False

    def prepare(self, instances: Iterable[str]) -> dict[str, str]:
        """Empty what an earlier run left, write a new token, and make each instance's folder for temporary files.

        The owner's folder is used where unix sockets fit into it; else a short one under the system's.
        """
        try:
            self.clear()
            for folder in (self.settings_folder, self.state_folder, self.tmp_folder):
                folder.mkdir(mode=0o700)
            self.write_private(self.token_file, secrets.token_hex(32).encode())
            return {name: self.make_tmp(name) for name in instances}
        except OSError as error:
            raise FleetError(f"cannot write to the run folder {self.folder}: {error.strerror}") from error

    def write_settings(self, file: str, settings: Mapping[str, Any]) -> None:
        """Write one process's settings file, readable by its owner only."""
        self.write_private(Path(file), msgspec.json.encode(settings))

    def write_private(self, file: Path, content: bytes) -> None:
        """Replace ``file`` in one step; mode 0600 from the first byte on."""
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=".new-")
        try:
            with open(handle, "wb") as stream:
                stream.write(content)
            os.replace(name, file)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise

    def rotate_log(self, name: str) -> None:
        """Begin a new log; the one before is kept as NAME.log.1."""
        with contextlib.suppress(FileNotFoundError):
            os.replace(self.log_file(name), self.logs_folder / f"{name}.log.1")

    def clear(self, *, keep_record: bool = False) -> None:
        """Remove everything but logs and lock."""
        for folder in (self.settings_folder, self.state_folder, self.tmp_folder):
            shutil.rmtree(folder, ignore_errors=True)
        self.token_file.unlink(missing_ok=True)
        if not keep_record:
            self.record_file.unlink(missing_ok=True)

    def make_tmp(self, name: str) -> str:
        """A folder for one instance's temporary files; a process's end removes it, a start makes it again."""
        folder = self.tmp_folder / name
        if len(os.fsencode(folder)) + _IPC_NAME_LEN <= limits.SOCKET_PATH_LEN_MAX:
            folder.mkdir(mode=0o700, exist_ok=True)
            return str(folder)
        return tempfile.mkdtemp(prefix="fleet-")


def _lock(handle: int) -> bool:
    """Take the lock; a few tries, as ``held`` of another process takes it for a moment."""
    for _ in range(_LOCK_TRIES):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.02)
    return False
