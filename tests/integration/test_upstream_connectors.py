"""Fleets that use vLLM's own connectors: NixlConnector for real, and MultiConnector with ours inside.

What one plain instance answers to these prompts is known without asking one: test_equality proves that it always says
the value that the facts give (test_one_plain_instance_is_always_right).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RunningFleet, SharedFleets, running_fleet
from tests.integration.asking import Answer, ask_all, body
from tests.integration.test_launcher_supervisor import Recorder, spec
from tests.planners import StaticPlanner
from vllm_fleet.bench.plain import scrape, total
from vllm_fleet.bench.recall import RecallPrompt, make_prompt
from vllm_fleet.config.connector import bearer, read_token
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import PeerGone
from vllm_fleet.launcher.fleet import Rules
from vllm_fleet.launcher.rundir import RunDir
from vllm_fleet.launcher.spec import ProcessSpec
from vllm_fleet.launcher.supervisor import Supervisor
from vllm_fleet.net import sockets
from vllm_fleet.net.control_client import ControlClient
from vllm_fleet.wire.control import Member

FINGERPRINT = {"connector": "nixl", "model": "m"}


# The supervisor speaks for instances; no vLLM -------------------------------------------------------------------------


@dataclass
class Spoken:
    """A supervisor with a real controller and two tiny servers for instances: ``both-0`` and ``both-1``."""

    supervisor: Supervisor
    view: Recorder
    client: ControlClient
    urls: dict[str, str]

    def pid(self, name: str) -> int:
        assert self.view.record is not None
        return next(each.id.pid for each in self.view.record.processes if each.name == name and each.id is not None)

    def members(self) -> dict[str, Member]:
        """What the controller knows; nobody when it does not answer."""
        return {one.name: one for one in self.client.snapshot(Deadline.after(2.0, "test")).members}

    def until(self, done: Callable[[dict[str, Member]], bool]) -> dict[str, Member]:
        """The members once they are as wanted."""
        pause = threading.Event()
        for _ in range(240):
            found = self.members()
            if done(found):
                return found
            pause.wait(0.05)
        raise AssertionError(found)


def states(members: Mapping[str, Member]) -> dict[str, str]:
    return {name: member.state for name, member in members.items()}


def controller_spec(run: RunDir, port: int) -> ProcessSpec:
    file = str(run.settings_folder / "controller.json")
    settings: dict[str, Any] = {
        "fleet": "f", "host": "127.0.0.1", "port": port, "token_file": str(run.token_file),
        "state_dir": str(run.state_folder), "heartbeat_s": 0.2, "suspect_s": 1.0, "lease_s": 3.0,
    }  # fmt: skip
    argv = (sys.executable, "-m", "vllm_fleet.controller", "--settings", file)
    return ProcessSpec(
        "controller", "controller", "controller", argv, f"http://127.0.0.1:{port}", {}, settings, file
    )  # fmt: skip


@pytest.fixture
def spoken(tmp_path: Path) -> Iterator[Spoken]:
    run = RunDir(tmp_path / "f")
    run.acquire()
    run.prepare([])
    ports = {name: sockets.free_port("127.0.0.1") for name in ("controller", "router", "both-0", "both-1")}

    def planner(chosen: Mapping[str, int]) -> tuple[ProcessSpec, ...]:
        upstream = [spec(name, "instance", chosen[name]) for name in ("both-0", "both-1")]
        return (
            controller_spec(run, chosen["controller"]),
            spec("router", "router", chosen["router"]),
            *(
                ProcessSpec(one.name, one.kind, one.role, one.argv, one.url, fingerprint=FINGERPRINT)
                for one in upstream
            ),
        )

    view = Recorder()
    rules = Rules(stop_s=5.0, ready_s=15.0)
    plans = StaticPlanner(planner, ports)
    supervisor = Supervisor(run, plans, frozenset(), rules, "m", dict(os.environ), view)
    thread = threading.Thread(target=supervisor.run)
    thread.start()
    try:
        assert view.is_ready.wait(15.0), view.record
        client = ControlClient(f"http://127.0.0.1:{ports['controller']}", bearer(read_token(run.token_file)))
        yield Spoken(supervisor, view, client, {one.name: one.url for one in planner(ports)})
    finally:
        while thread.is_alive():
            supervisor.stop()
            thread.join(2.0)
        run.release()


def test_instances_are_registered_and_one_that_dies_leaves_at_once(spoken: Spoken) -> None:
    found = spoken.until(lambda members: states(members) == {"both-0": "ready", "both-1": "ready"})
    for name, member in found.items():
        assert (member.role, member.url, member.pid) == ("both", spoken.urls[name], spoken.pid(name))
        assert (member.fingerprint, member.workers) == (FINGERPRINT, ())
    assert found["both-0"].incarnation != found["both-1"].incarnation
    os.kill(spoken.pid("both-0"), signal.SIGKILL)
    spoken.until(lambda members: states(members) == {"both-1": "ready"})


def test_one_that_stops_answering_is_suspected_and_comes_back(spoken: Spoken) -> None:
    first = spoken.until(lambda members: states(members) == {"both-0": "ready", "both-1": "ready"})
    pid = spoken.pid("both-0")
    os.kill(pid, signal.SIGSTOP)
    try:
        spoken.until(lambda members: states(members).get("both-0") in ("suspect", None))
        assert states(spoken.members())["both-1"] == "ready"
        spoken.until(lambda members: "both-0" not in members)  # its lease ended
    finally:
        os.kill(pid, signal.SIGCONT)
    again = spoken.until(lambda members: states(members).get("both-0") == "ready")
    assert again["both-0"].incarnation == first["both-0"].incarnation, "the same process"
    assert again["both-0"].generation > first["both-0"].generation


def test_a_controller_that_was_restarted_hears_them_again(spoken: Spoken) -> None:
    spoken.until(lambda members: states(members) == {"both-0": "ready", "both-1": "ready"})
    before = spoken.pid("controller")
    os.kill(before, signal.SIGKILL)
    pause = threading.Event()
    for _ in range(200):
        if spoken.pid("controller") != before:
            with contextlib.suppress(PeerGone):  # not up yet
                spoken.until(lambda members: states(members) == {"both-0": "ready", "both-1": "ready"})
                break
        pause.wait(0.05)
    pause.wait(2.0)  # longer than suspect_s: what it read from its journal would be suspect by now
    assert states(spoken.members()) == {"both-0": "ready", "both-1": "ready"}


# Real vLLM ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(shared_fleets: SharedFleets, tmp_path: Path) -> Path:
    """A folder for a fleet of this test's own, with no other fleet running: an instance takes 3 GB."""
    shared_fleets.stop()
    return tmp_path


def prompts(count: int) -> list[RecallPrompt]:
    """Of less than a block to several blocks."""
    rng = random.Random(17)
    return [make_prompt(rng, rng.choice([10, 40, 90, 170])) for _ in range(count)]


def asked(fleet: RunningFleet, wanted: list[RecallPrompt], *, stream: bool, concurrency: int) -> list[Answer]:
    requests = [body(one.text, max_tokens=len(one.value), stream=stream) for one in wanted]
    return ask_all(fleet.router, requests, concurrency)


def assert_right(answers: list[Answer], wanted: list[RecallPrompt]) -> None:
    for answer, prompt in zip(answers, wanted, strict=True):
        assert answer.status == 200, answer.raw
        assert answer.text == prompt.value
        assert answer.handoff == "handed_off"


@pytest.mark.vllm
@pytest.mark.timeout(400)
def test_nixl(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's NixlConnector over UCX, driven by our launcher, controller and router; decode loads every prompt."""
    monkeypatch.setenv("FLEET_CONNECTOR__KIND", "nixl")
    # Its first handshake takes half a minute on busy cores, and it uses KV whose lease has ended without a word.
    monkeypatch.setenv("FLEET_HANDOFF__LEASE_S", "180")
    wanted = prompts(3)
    with running_fleet(alone) as fleet:
        before = scrape(fleet.decode)
        answers = asked(fleet, wanted[:2], stream=False, concurrency=1)
        answers += asked(fleet, wanted[2:], stream=True, concurrency=1)
        assert_right(answers, wanted)
        after = scrape(fleet.decode)
        assert {one["state"] for one in fleet.status()["instances"]} == {"ready"}

    def grown(name: str, **labels: str) -> float:
        return total(after, name, **labels) - total(before, name, **labels)

    loaded = grown("vllm:external_prefix_cache_hits_total")
    computed = grown("vllm:prompt_tokens_by_source_total", source="local_compute")
    assert loaded > 0
    assert computed < loaded, "decode computed its prompts itself"


@pytest.mark.vllm
@pytest.mark.timeout(300)
def test_multi_with_ours_inside(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's MultiConnector with ours in it; nothing that vLLM has beside it runs on a CPU (docs/connectors.md)."""
    monkeypatch.setenv("FLEET_CONNECTOR__KIND", "multi")
    monkeypatch.setenv("FLEET_CONNECTOR__INSIDE", json.dumps(["fleet"]))
    wanted = prompts(24)
    with running_fleet(alone) as fleet:
        answers = asked(fleet, wanted[:12], stream=False, concurrency=6)
        answers += asked(fleet, wanted[12:], stream=True, concurrency=6)
        assert_right(answers, wanted)
        page = scrape(fleet.decode)
        assert "MultiConnector" in fleet.log("decode-0")
    ended = total(page, "vllm:fleet_handoffs_total", outcome="loaded")
    assert ended + total(page, "vllm:fleet_handoffs_total", outcome="local") == len(wanted)
    assert ended > 0
    assert total(page, "vllm:fleet_handoff_bytes_total") > 0
