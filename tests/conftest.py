"""Shared by all tests: real instances are started once per session and shared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("fleet", deadline=None)  # how long an example takes says something about the machine only
settings.load_profile("fleet")

MODEL = Path(__file__).parents[1] / "examples" / "recall" / "fleet-recall"
HANDOFFS = {"cma": "streamed", "tcp": "sequential"}
"""How the shared fleets hand over: both ways and both transports are run, in two fleets."""

COMMAND = str(Path(sys.executable).parent / "vllm-fleet")


@dataclass(frozen=True)
class RunningFleet:
    """A fleet that a test may ask."""

    home: Path
    router: str
    controller: str
    urls: dict[str, str]
    pids: dict[str, int]
    router_admin: str = ""
    """Where its metrics are."""

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
        router, controller = status["router"], status["controller"]
        yield RunningFleet(home, router["url"], controller["url"], urls, pids, router["admin_url"])
    finally:
        down = fleet_command(home, "down")
    assert down.returncode == 0, down.stdout + down.stderr


class SharedFleets:
    """At most one fleet at a time that tests share: asking for another stops the one before. An instance takes 3 GB."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory
        self._stack = ExitStack()
        self._key: str | None = None
        self._running: RunningFleet | None = None

    def get(self, transport: str) -> RunningFleet:
        """The fleet whose links are of this transport."""
        config = f"fabric: {{transports: [{transport}]}}\nrouter: {{handoff: {HANDOFFS[transport]}}}\n"
        return self.configured(transport, f"{config}handoff: {{load: always}}\n")

    def configured(self, key: str, config: str) -> RunningFleet:
        """The fleet of this fleet.yaml, which ``key`` names."""
        if self._running is None or self._key != key:
            self.stop()
            home = self._factory.mktemp(key)
            file = home / "fleet.yaml"
            file.write_text(config)
            self._running = self._stack.enter_context(running_fleet(home, "--config", str(file)))
            self._key = key
        return self._running

    def stop(self) -> None:
        """Stop the running one, if any."""
        self._running = None
        self._stack.close()


@pytest.fixture(scope="session")
def shared_fleets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedFleets]:
    fleets = SharedFleets(tmp_path_factory)
    yield fleets
    fleets.stop()


@pytest.fixture
def cma_fleet(shared_fleets: SharedFleets) -> RunningFleet:
    """A fleet whose links are cma, with streamed handoffs."""
    return shared_fleets.get("cma")


@pytest.fixture
def tcp_fleet(shared_fleets: SharedFleets) -> RunningFleet:
    """A fleet whose links are tcp, with sequential handoffs."""
    return shared_fleets.get("tcp")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Shuffled as they are, tests that share a fleet run one after the other: fleets are started once each."""

    def group(item: pytest.Item) -> int:
        if item.get_closest_marker("vllm") is None:
            return 0
        text = f"{item.name} {' '.join(getattr(item, 'fixturenames', ()))}"
        return 1 if "cma" in text else 2 if "tcp" in text else 3 if "many" in text else 4

    items.sort(key=group)
