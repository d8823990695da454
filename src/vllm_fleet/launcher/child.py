"""One child process: started in a session of its own, so that all it starts can be found and killed with it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from vllm_fleet.core.errors import FleetError
from vllm_fleet.launcher import leftovers, processes
from vllm_fleet.launcher.leftovers import Leftover
from vllm_fleet.launcher.processes import ProcessId, Row
from vllm_fleet.launcher.rundir import HOME_VARIABLE
from vllm_fleet.launcher.spec import ProcessSpec

BURY_S = 1.0  # for helpers of a dead child to end after SIGKILL
MARK = "KEPT_AS"
"""A variable of its environment, which its helpers inherit wherever they go."""
PR_SET_PDEATHSIG = 1  # linux/prctl.h
PR_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, value: int) -> None:
    """prctl(2) with one argument; OSError when the kernel refuses."""
    if _LIBC.prctl(option, ctypes.c_ulong(value), 0, 0, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def own_environment() -> dict[str, str]:
    """A copy of this process's environment, for a child to inherit; no settings are read from it."""
    return dict(os.environ)


def _tie() -> None:
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class ChildProcess:
    """A running child. Its owner calls ``poll`` until it has ended, then ``bury`` once."""

    node = ""
    reason = ""

    def __init__(
        self, spec: ProcessSpec, log_file: Path | None, environ: Mapping[str, str], *, tied: bool = False
    ) -> None:
        """Start it; what it says goes to ``log_file``, which outlives us, or where our own output goes.

        ``tied``: the kernel kills it when the thread that calls this ends. Only for processes of one thread.

        Raises:
            FleetError: the program or the log cannot be opened.
        """
        self.mark = f"{spec.name}-{secrets.token_hex(8)}"
        env = {name: value for name, value in environ.items() if name != HOME_VARIABLE} | dict(spec.env)
        env[MARK] = self.mark
        try:
            if spec.tmp is not None:
                os.makedirs(spec.tmp, mode=0o700, exist_ok=True)
            with contextlib.ExitStack() as stack:
                log = None if log_file is None else stack.enter_context(log_file.open("ab"))
                self._popen = subprocess.Popen(
                    spec.argv, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                    start_new_session=True, preexec_fn=_tie if tied else None,
                )  # fmt: skip
        except (OSError, ValueError) as error:  # ValueError: a NUL byte in an argument
            raise FleetError(f"cannot start {spec.name}: {error}") from error
        self.spec = spec
        self.pid = self._popen.pid
        row = processes.read(self.pid)
        assert row is not None, "our own child, not waited for yet"
        self.id = row.id
        self.tree: set[ProcessId] = {self.id}
        self.leftovers: set[Leftover] = set()

    def poll(self) -> bool:
        """Whether it has ended. It stays a zombie until ``bury``, so that its pid means it and nobody else."""
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True

    def remember(self, rows: Iterable[Row]) -> None:
        """Note its helpers and what they would leave behind, while they live."""
        self.tree = processes.tree(self.pid, rows, known=self.tree)
        self.leftovers |= leftovers.collect(self.tree)

    def signal_group(self, signum: signal.Signals) -> None:
        """Signal it and its helpers; nothing happens when they are gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signum)

    def bury(self) -> int:
        """After its end: kill what is left of its tree, remove what they left behind; its exit code."""
        self.tree |= processes.marked(MARK, self.mark)
        self.remember(processes.table())
        self.signal_group(signal.SIGKILL)
        code = self._popen.wait()
        processes.kill(self.tree, BURY_S)
        leftovers.remove(self.leftovers)
        if self.spec.tmp is not None:
            shutil.rmtree(self.spec.tmp, ignore_errors=True)
        return code
