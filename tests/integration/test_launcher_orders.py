"""Orders to a supervisor with a real controller and tiny servers for instances: no vLLM."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.integration.test_launcher_supervisor import Recorder, pids, states
from tests.integration.test_launcher_supervisor import spec as tiny
from tests.integration.test_upstream_connectors import FINGERPRINT, controller_spec
from tests.planners import StaticPlanner
from vllm_fleet.core.errors import BadRequest, FleetError, PeerGone
from vllm_fleet.launcher import desired, processes
from vllm_fleet.launcher.fleet import Rules
from vllm_fleet.launcher.orders import Edit, Orders
from vllm_fleet.launcher.record import FleetRecord
from vllm_fleet.launcher.rundir import RunDir
from vllm_fleet.launcher.spec import ProcessSpec
from vllm_fleet.launcher.supervisor import Supervisor
from vllm_fleet.net import sockets
from vllm_fleet.wire.names import Role

SERVER = """
import http.server, os, sys
busy = sys.argv[2]
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        running = int(os.path.exists(busy))
        body = b"vllm:num_requests_running %d\\nvllm:num_requests_waiting 0\\n" % running
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
BROKEN = "raise SystemExit('no')"


class Fleet:
    """A supervisor in a thread of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.broken: set[str] = set()
        self.run = RunDir(folder / "f")
        self.run.acquire()
        self.run.prepare([])
        self.view = Recorder()
        ports = {name: sockets.free_port("127.0.0.1") for name in ("controller", "router")}
        first = ("prefill-0", "decode-0")
        ports |= {name: sockets.free_port("127.0.0.1") for name in first}

        def make(chosen: Mapping[str, int]) -> tuple[ProcessSpec, ...]:
            own = (controller_spec(self.run, chosen["controller"]), tiny("router", "router", chosen["router"]))
            instances = [self.instance(name, _role(name), chosen[name]) for name in first if name in chosen]
            return (*own, *instances)

        rules = Rules(ready_s=15.0, stop_s=5.0, drain_s=15.0, restarts_max=1, quiet_s=0.5, held_s=0.6)
        self.planner = StaticPlanner(make, ports, self.instance)
        self.supervisor = Supervisor(
            self.run, self.planner, frozenset(), rules, "m", dict(os.environ), self.view
        )  # fmt: skip
        self._thread = threading.Thread(target=self.supervisor.run)
        self._thread.start()

    def instance(self, name: str, role: Role, port: int) -> ProcessSpec:
        code = BROKEN if name in self.broken else SERVER
        argv = (sys.executable, "-S", "-c", code, str(port), str(self.busy(name)))
        return ProcessSpec(name, "instance", role, argv, f"http://127.0.0.1:{port}", fingerprint=FINGERPRINT)

    def busy(self, name: str) -> Path:
        """While this file exists the instance has a request."""
        return self.folder / f"{name}.busy"

    def order(self, edit: Edit, timeout_s: float = 18.0) -> FleetRecord:
        orders = self.orders()
        return orders.wait(orders.change(edit), lambda record: None, timeout_s)

    def orders(self) -> Orders:
        """Once the controller knows what the fleet is to be."""
        self.until(lambda record: record.revision > 0)
        return Orders(self.run)

    def until(self, done: Callable[[FleetRecord], bool]) -> FleetRecord:
        for _ in range(300):
            if self.view.record is not None and done(self.view.record):
                return self.view.record
            time.sleep(0.05)
        raise AssertionError(self.view.record)

    def close(self) -> None:
        while self._thread.is_alive():
            self.supervisor.stop()
            self._thread.join(1.0)
        self.run.release()


def _role(name: str) -> Role:
    return "prefill" if name.startswith("prefill") else "decode"


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    made = Fleet(tmp_path)
    assert made.view.is_ready.wait(15.0), made.view.record
    yield made
    made.close()


pytestmark = pytest.mark.timeout(60)


def test_several_join_and_leave_at_once(fleet: Fleet) -> None:
    before = pids(fleet.until(lambda record: record.phase == "serving"))
    record = fleet.order(lambda slots, _: desired.scaled(slots, {"prefill": 2, "decode": 3}))
    assert list(states(record)) == [
        "controller", "router", "prefill-0", "decode-0", "prefill-1", "decode-1", "decode-2",
    ]  # fmt: skip
    assert set(states(record).values()) == {"ready"}
    added = pids(record)
    record = fleet.order(lambda slots, _: desired.scaled(slots, {"prefill": 1, "decode": 1}))
    assert pids(record) == before
    assert not any(processes.alive(added[name]) for name in added.keys() - before.keys())
    assert fleet.planner.ports.keys() == before.keys(), "their ports are free"


def test_one_that_is_busy_stays_until_it_is_not(fleet: Fleet) -> None:
    fleet.order(lambda slots, _: desired.scaled(slots, {"decode": 2}))
    fleet.busy("decode-1").touch()
    with pytest.raises(FleetError, match=r"^not done within 3 s .* decode-1 is draining$"):
        fleet.order(lambda slots, _: desired.without(slots, "decode-1"), 3.0)
    fleet.busy("decode-1").unlink()
    record = fleet.until(lambda record: "decode-1" not in states(record))
    assert not any("is stopped after" in note for note in fleet.view.notes)
    assert states(record)["decode-0"] == "ready"


def test_a_rolling_restart_of_all(fleet: Fleet) -> None:
    fleet.order(lambda slots, _: desired.scaled(slots, {"prefill": 2, "decode": 2}))
    before = pids(fleet.until(lambda record: record.phase == "serving"))
    ready_s: list[int] = []
    orders = fleet.orders()

    def show(record: FleetRecord) -> None:
        ready_s.append(sum(state == "ready" for state in states(record).values()))

    record = orders.wait(orders.change(lambda slots, _: desired.restarted(slots, [], rolling=True)), show, 50.0)
    after = pids(record)
    assert after.keys() == before.keys()
    instances = after.keys() - {"controller", "router"}
    assert {name for name in after if after[name] != before[name]} == instances
    assert min(ready_s) == 5, "one at a time"


def test_one_that_cannot_start_is_given_up_and_said(fleet: Fleet) -> None:
    fleet.broken.add("decode-1")
    with pytest.raises(FleetError, match=r"^decode-1 died 2 times within 600 s"):
        fleet.order(lambda slots, _: desired.scaled(slots, {"decode": 2}))
    assert states(fleet.until(lambda record: True))["decode-0"] == "ready"
    fleet.broken.clear()
    record = fleet.order(lambda slots, _: desired.restarted(slots, ["decode-1"], rolling=False))
    assert states(record)["decode-1"] == "ready"


def test_roles_of_vllms_own_connectors_stay(fleet: Fleet) -> None:
    fleet.order(lambda slots, _: desired.scaled(slots, {"decode": 2}))
    with pytest.raises(BadRequest, match="decode-1 runs with vLLM's own connector 'nixl'"):
        fleet.order(lambda slots, _: desired.with_role(slots, "decode-1", "prefill"))


def test_a_controller_that_dies_forgets_nothing(fleet: Fleet) -> None:
    fleet.order(lambda slots, _: desired.scaled(slots, {"decode": 2}))
    before = pids(fleet.until(lambda record: record.phase == "serving"))
    processes.kill([before["controller"]], 2.0)
    with pytest.raises(PeerGone, match="is away"):
        Orders(fleet.run).change(lambda slots, _: desired.scaled(slots, {"decode": 1}))
    fleet.until(lambda record: pids(record)["controller"] != before["controller"]
                and states(record)["controller"] == "ready")  # fmt: skip
    record = fleet.order(lambda slots, _: desired.scaled(slots, {"decode": 3}))
    assert [slot.name for slot in record.desired] == ["prefill-0", "decode-0", "decode-1", "decode-2"]
    assert all(pids(record)[name] == before[name] for name in ("prefill-0", "decode-0", "decode-1"))
