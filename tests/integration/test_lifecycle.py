"""A fleet that is scaled, turned round, drained and restarted while it serves: nobody who asks it anything notices."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import psutil
import pytest

from tests.conftest import MODEL, RunningFleet, SharedFleets, running_fleet
from tests.integration.load import (
    CONCURRENCY,
    Load,
    client,
    controllers,
    deadline,
    lives,
    members,
    seeds,
    snapshot,
    wait_for,
)
from vllm_fleet.bench.plain import post, scrape, total
from vllm_fleet.bench.recall import make_prompt
from vllm_fleet.core.errors import FleetError
from vllm_fleet.wire.control import Desired, Slot
from vllm_fleet.wire.names import Role

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

PATIENCE_S = 1500.0  # for one command, with other work on the machine
CONFIG = """
handoff: {lease_s: 10, load: always}
launcher: {drain_s: 60, ready_s: 900}
router: {request_timeout_s: 120}
"""


@pytest.fixture(scope="module")
def fleet(shared_fleets: SharedFleets, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFleet]:
    """One prefill and one decode instance; the tests make more of it and leave it as they found it."""
    shared_fleets.stop()
    home = tmp_path_factory.mktemp("lifecycle")
    config = home / "fleet.yaml"
    config.write_text(CONFIG)
    with running_fleet(home, "--config", str(config)) as running:
        yield running


def done(fleet: RunningFleet, *words: str) -> dict[str, Any]:
    """A command that must succeed; the status it prints."""
    run = fleet.command(*words, "--json", "--timeout", f"{PATIENCE_S:g}", timeout_s=PATIENCE_S + 20)
    assert run.returncode == 0, run.stdout + run.stderr + fleet.log("supervisor")[-3000:]
    parsed: dict[str, Any] = json.loads(run.stdout)
    return parsed


def ready(status: dict[str, Any]) -> dict[str, str]:
    """Instance -> role, of those that are ready; there must be no others."""
    assert {one["state"] for one in status["instances"]} == {"ready"}, status
    return {one["name"]: one["role"] for one in status["instances"]}


def pids(fleet: RunningFleet) -> dict[str, int]:
    return {one["name"]: one["pid"] for one in fleet.status()["instances"]}


def begin(fleet: RunningFleet, *names: str) -> None:
    """Exactly these instances, in the roles of their names, whatever a test before has left."""
    slots = tuple(Slot(name, cast(Role, name.rpartition("-")[0])) for name in names)
    wish = Desired(client(fleet).desired(deadline()).revision, slots)
    client(fleet).desire(wish, deadline())

    def so() -> bool:
        found = {one["name"]: (one["role"], one["state"]) for one in fleet.status()["instances"]}
        known = set(members(fleet))  # one that left is a member until its lease ends
        return known == set(names) and found == {slot.name: (slot.role, "ready") for slot in slots}

    wait_for(f"a fleet of {', '.join(names)}", so, PATIENCE_S)


def test_scaling_up_and_down_under_load(fleet: RunningFleet) -> None:
    begin(fleet, "prefill-0", "decode-0")
    before = pids(fleet)
    cut = fleet.log("supervisor").count("drain.cut")
    with Load(fleet) as load:
        status = done(fleet, "scale", "prefill=1", "decode=2")
        assert ready(status) == {"prefill-0": "prefill", "decode-0": "decode", "decode-1": "decode"}
        assert status["desired"] == {"prefill": 1, "decode": 2, "both": 0}
        load.more(2 * CONCURRENCY)
        added = pids(fleet)["decode-1"]
        assert psutil.pid_exists(added)
        status = done(fleet, "scale", "decode=1")
        assert ready(status) == {"prefill-0": "prefill", "decode-0": "decode"}
        assert not psutil.pid_exists(added)
        load.more(CONCURRENCY)
    decoded = load.check()
    assert decoded["decode-1"] > 0, "the one that joined got requests"
    assert pids(fleet) == before, "the others were not touched"
    assert fleet.log("supervisor").count("drain.cut") == cut


def test_roles_there_and_back_under_load(fleet: RunningFleet) -> None:
    begin(fleet, "prefill-0", "decode-0", "decode-1")
    before = pids(fleet)
    with Load(fleet) as load:
        for _ in range(2):
            assert ready(done(fleet, "role", "decode-1", "prefill"))["decode-1"] == "prefill"
            held = handed_over(fleet, "decode-1")
            wait_for("decode-1 computes for others", partial(hands_over_more, fleet, "decode-1", held), 60.0)
            assert ready(done(fleet, "role", "decode-1", "decode"))["decode-1"] == "decode"
            load.more(CONCURRENCY)
            assert ready(done(fleet, "role", "prefill-0", "both"))["prefill-0"] == "both"
            load.more(CONCURRENCY)
            assert ready(done(fleet, "role", "prefill-0", "prefill"))["prefill-0"] == "prefill"
    decoded = load.check()
    assert decoded["decode-1"] > 0
    assert decoded["prefill-0"] > 0
    assert pids(fleet) == before, "no process was restarted"


def hands_over_more(fleet: RunningFleet, name: str, before: float) -> bool:
    return handed_over(fleet, name) > before


def handed_over(fleet: RunningFleet, name: str) -> float:
    url = next(one["url"] for one in fleet.status()["instances"] if one["name"] == name)
    return total(scrape(url), "vllm:fleet_handoffs_total", outcome="held")


def test_a_prefill_with_handoffs_pending_is_drained(fleet: RunningFleet) -> None:
    begin(fleet, "prefill-0", "prefill-1", "decode-0")
    cut = fleet.log("supervisor").count("drain.cut")
    victim = next(one for one in fleet.status()["instances"] if one["name"] == "prefill-1")
    with Load(fleet) as load:
        load.more(CONCURRENCY)
        prompt = make_prompt(random.Random(next(seeds)), 100)
        asked = {
            "model": MODEL.name, "prompt": prompt.text, "max_tokens": 1, "temperature": 0,
            "kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False},
        }  # fmt: skip
        held, _ = post(f"{victim['url']}/v1/completions", asked)
        assert held["kv_transfer_params"]
        run = fleet.command("drain", "prefill-1", "--timeout", "0")
        assert run.returncode == 0, run.stderr
        wait_for("prefill-1 drains", lambda: members(fleet)["prefill-1"].state == "draining", 5.0)
        time.sleep(3.0)  # longer than an instance must be quiet: only the pin keeps it
        assert psutil.pid_exists(victim["pid"]), "it left though KV was pending"
        taken = {**asked, "max_tokens": 3, "kv_transfer_params": held["kv_transfer_params"]}
        answer, _ = post(f"{members(fleet)['decode-0'].url}/v1/completions", taken)
        assert answer["choices"][0]["text"] == prompt.value
        wait_for("prefill-1 leaves", lambda: "prefill-1" not in pids(fleet), 60.0)
        assert not psutil.pid_exists(victim["pid"])
        load.more(CONCURRENCY)
    load.check()
    assert sorted(ready(fleet.status())) == ["decode-0", "prefill-0"]
    assert fleet.log("supervisor").count("drain.cut") == cut


class Fewest:
    """The fewest instances of each role that ran while it looked."""

    def __init__(self, fleet: RunningFleet) -> None:
        self.of: dict[str, int] = {"prefill": 9, "decode": 9}
        self._fleet = fleet
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Fewest:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(0.2):
            with contextlib.suppress(FleetError):
                # A suspect is late with its heartbeat, on a machine with too little time for all; it runs.
                found = Counter(str(m.role) for m in members(self._fleet).values() if m.state in ("ready", "suspect"))
                self.of = {role: min(count, found[role]) for role, count in self.of.items()}


@pytest.mark.long
def test_a_rolling_restart_of_two_and_two_under_load(fleet: RunningFleet) -> None:
    begin(fleet, "prefill-0", "prefill-1", "decode-0", "decode-1")
    cut = fleet.log("supervisor").count("drain.cut")
    before = {name: member.incarnation for name, member in members(fleet).items()}
    with Load(fleet) as load:
        with Fewest(fleet) as fewest:
            status = done(fleet, "restart", "--rolling")
        load.more(CONCURRENCY)
    load.check()
    assert sorted(ready(status)) == ["decode-0", "decode-1", "prefill-0", "prefill-1"]
    after = {name: member.incarnation for name, member in members(fleet).items()}
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in before), "everybody lives anew"
    assert fewest.of == {"prefill": 1, "decode": 1}, "one at a time"
    assert fleet.log("supervisor").count("drain.cut") == cut


@pytest.mark.long
def test_the_only_one_of_a_role_is_replaced_first(fleet: RunningFleet) -> None:
    begin(fleet, "prefill-0", "decode-0")
    with Load(fleet) as load:
        status = done(fleet, "restart", "--rolling", "decode-0")
        load.more(CONCURRENCY)
    decoded = load.check()
    (new,) = ready(status).keys() - {"prefill-0"}
    assert new != "decode-0"
    assert decoded["decode-0"] > 0
    assert decoded[new] > 0


def test_the_controller_is_killed_under_load(fleet: RunningFleet) -> None:
    begin(fleet, "prefill-0", "decode-0")
    before = snapshot(fleet)
    with Load(fleet, pause_s=(0.5, 2.0)) as load:
        began = time.monotonic()
        (victim,) = controllers(fleet)
        victim.send_signal(signal.SIGKILL)
        wait_for("the controller is back", lambda: answers(fleet), 10.0)
        while time.monotonic() - began < 60.0:
            load.more(CONCURRENCY)
    load.check()
    after = snapshot(fleet)
    assert not victim.is_running()
    assert after.controller == before.controller, "the same journal"
    assert lives(after) == lives(before)


def answers(fleet: RunningFleet) -> bool:
    try:
        snapshot(fleet)
    except Exception:  # noqa: BLE001 - it is away, in any of the ways there are
        return False
    return True


def test_an_instance_that_is_killed_comes_back_by_itself(fleet: RunningFleet) -> None:
    begin(fleet, "prefill-0", "prefill-1", "decode-0")
    victim = psutil.Process(pids(fleet)["prefill-1"])
    old = members(fleet)["prefill-1"].incarnation
    url = members(fleet)["prefill-1"].url
    with Load(fleet) as load:
        for process in [*victim.children(recursive=True), victim]:
            process.kill()
        wait_for("prefill-1 is back", lambda: back(fleet, "prefill-1", old), PATIENCE_S)
        load.more(2 * CONCURRENCY)
    load.check()
    assert members(fleet)["prefill-1"].url == url, "where it was"
    assert ready(fleet.status())["prefill-1"] == "prefill"


def back(fleet: RunningFleet, name: str, old: str) -> bool:
    member = members(fleet).get(name)
    return member is not None and member.incarnation != old and member.state == "ready"
