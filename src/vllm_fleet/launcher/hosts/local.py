"""Processes beside the supervisor. They outlive one that is killed, and `vllm-fleet down` finds them in its record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vllm_fleet.launcher.child import ChildProcess
from vllm_fleet.launcher.spec import ProcessSpec


class LocalLauncher:
    """Starts processes on this machine, as this user."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    def start(self, spec: ProcessSpec, log_file: Path) -> ChildProcess:
        """Start it; FleetError when the program or the log cannot be opened."""
        return ChildProcess(spec, log_file, self._environ)

    def close(self) -> None:
        """Nothing is held."""
