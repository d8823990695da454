"""A fleet whose two controllers keep the journal in etcd: etcd and the leader die under load, and nobody notices."""

from __future__ import annotations

import json
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import psutil
import pytest

from tests.conftest import RunningFleet, SharedFleets, running_fleet
from tests.contract.etcd_server import ETCD, MISSING, EtcdServer
from tests.integration.load import CONCURRENCY, Load, controllers, deadline, lives, wait_for
from vllm_fleet.config.connector import bearer, read_token
from vllm_fleet.net.control_client import ControlClient
from vllm_fleet.wire.control import Snapshot

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900), pytest.mark.skipif(ETCD is None, reason=MISSING)]

PAUSE_S = (0.5, 2.0)
LOAD_S = 60.0
ETCD_AWAY_S = 6.0  # twice the lease of a leader


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    server = EtcdServer(tmp_path_factory.mktemp("etcd"))
    yield server
    server.kill()


@pytest.fixture(scope="module")
def fleet(
    etcd: EtcdServer, shared_fleets: SharedFleets, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningFleet]:
    shared_fleets.stop()
    home = tmp_path_factory.mktemp("two-controllers")
    config = home / "fleet.yaml"
    config.write_text(f"controller: {{store: etcd, replicas: 2, etcd: {{endpoints: ['{etcd.url}']}}}}\n")
    with running_fleet(home, "--config", str(config)) as running:
        yield running


def urls(fleet: RunningFleet) -> list[str]:
    found: list[str] = fleet.status()["controller"]["urls"]
    return found


def snapshot(fleet: RunningFleet) -> Snapshot:
    token = bearer(read_token(fleet.home / "default" / "token"))
    return ControlClient(urls(fleet), token).snapshot(deadline())


def leader(fleet: RunningFleet) -> str:
    """Its URL; empty while nobody leads."""
    for url in urls(fleet):
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=1.0) as answer:
                if json.loads(answer.read())["status"] != "standby":
                    return url
        except (urllib.error.URLError, OSError):
            continue
    return ""


def process_at(fleet: RunningFleet, url: str) -> psutil.Process:
    """The controller that listens there."""
    port = int(url.rpartition(":")[2])
    (found,) = [
        process
        for process in controllers(fleet)
        if any(one.status == psutil.CONN_LISTEN and one.laddr.port == port for one in process.net_connections())
    ]
    return found


def go_on(load: Load, began: float) -> None:
    """Until the load has lasted LOAD_S."""
    while time.monotonic() - began < LOAD_S:
        load.more(CONCURRENCY)


def test_etcd_is_killed_and_comes_back_under_load(fleet: RunningFleet, etcd: EtcdServer) -> None:
    before = snapshot(fleet)
    with Load(fleet, PAUSE_S) as load:
        began = time.monotonic()
        etcd.kill()
        time.sleep(ETCD_AWAY_S)
        load.more(CONCURRENCY)
        etcd.start()
        wait_for("a controller leads", lambda: leader(fleet) != "", 30.0)
        go_on(load, began)
    load.check()
    after = snapshot(fleet)
    assert after.controller == before.controller, "the same journal"
    assert lives(after) == lives(before)


def test_the_leader_is_killed_under_load(fleet: RunningFleet) -> None:
    before, led = snapshot(fleet), leader(fleet)
    assert led
    with Load(fleet, PAUSE_S) as load:
        began = time.monotonic()
        victim = process_at(fleet, led)
        victim.send_signal(signal.SIGKILL)
        wait_for("another controller leads", lambda: leader(fleet) not in ("", led), 30.0)
        wait_for("the one that was killed is back", lambda: len(controllers(fleet)) == 2, 30.0)
        go_on(load, began)
    load.check()
    after = snapshot(fleet)
    assert not victim.is_running()
    assert after.controller == before.controller, "the same journal"
    assert lives(after) == lives(before)
    assert {one["state"] for one in fleet.status()["instances"]} == {"ready"}
