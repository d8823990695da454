"""Shared by all tests: real instances are started once per session and shared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vllm_fleet.bench.plain import plain_instance

MODEL = Path(__file__).parents[1] / "examples" / "recall" / "fleet-recall"
COMMAND = str(Path(sys.executable).parent / "vllm-fleet")


@dataclass(frozen=True)
class RunningFleet:
    """A fleet that a test may ask."""

    home: Path
    router: str
    controller: str
    urls: dict[str, str]
    pids: dict[str, int]

    @property
    def prefill(self) -> str:
        return self.urls["prefill-0"]

    @property
    def decode(self) -> str:
        return self.urls["decode-0"]

    def command(self, *words: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run a vllm-fleet command on this fleet."""
        return fleet_command(self.home, *words, timeout_s=timeout_s)

    def status(self) -> dict[str, Any]:
        """What `vllm-fleet status --json` prints."""
        run = self.command("status", "--json")
        assert run.returncode == 0, run.stderr
        parsed: dict[str, Any] = json.loads(run.stdout)
        return parsed

    def log(self, name: str) -> str:
        """One process's log."""
        return (self.home / "default" / "logs" / f"{name}.log").read_text(errors="replace")


def fleet_command(home: Path, *words: str, timeout_s: float = 400.0) -> subprocess.CompletedProcess[str]:
    """Run vllm-fleet with its state under ``home``."""
    env = {**os.environ, "VLLM_FLEET_HOME": str(home)}
    return subprocess.run([COMMAND, *words], env=env, capture_output=True, text=True, timeout=timeout_s, check=False)


@contextmanager
def running_fleet(home: Path, *flags: str) -> Iterator[RunningFleet]:
    """Bring a fleet of the demo model up with `vllm-fleet up --detach`, and down again."""
    up = fleet_command(home, "up", "--detach", "--model", str(MODEL), "--router-port", "0", *flags)
    assert up.returncode == 0, up.stdout + up.stderr
    try:
        status = json.loads(fleet_command(home, "status", "--json").stdout)
        urls = {instance["name"]: instance["url"] for instance in status["instances"]}
        pids = {instance["name"]: instance["pid"] for instance in status["instances"]}
        yield RunningFleet(home, status["router"]["url"], status["controller"]["url"], urls, pids)
    finally:
        down = fleet_command(home, "down")
    assert down.returncode == 0, down.stdout + down.stderr


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of one plain vLLM instance without any connector."""
    with plain_instance(MODEL, tmp_path_factory.mktemp("plain") / "plain.log") as url:
        yield url


@pytest.fixture(scope="session")
def cma_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFleet]:
    """A fleet whose links are cma."""
    with running_fleet(tmp_path_factory.mktemp("cma"), "--transport", "cma") as fleet:
        yield fleet


@pytest.fixture(scope="session")
def tcp_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFleet]:
    """A fleet whose links are tcp."""
    with running_fleet(tmp_path_factory.mktemp("tcp"), "--transport", "tcp") as fleet:
        yield fleet
