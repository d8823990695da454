"""The ends of fleets and of instances: what runs ends first, what keeps dying is left alone and holds nothing."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import random
import signal
import time
from pathlib import Path

import aiohttp
import pytest

from tests.conftest import MODEL, RunningFleet, SharedFleets, fleet_command
from tests.integration.load import CONCURRENCY, DEADLINE_S, wait_for
from vllm_fleet.bench.plain import scrape, total
from vllm_fleet.bench.recall import make_prompt
from vllm_fleet.bench.storm_client import Ended, Order, ask

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


def test_a_fleet_that_is_told_to_stop_ends_what_it_has_begun(shared_fleets: SharedFleets, tmp_path: Path) -> None:
    """Requests that had begun are answered; whoever comes later is told to come again."""
    shared_fleets.stop()
    up = fleet_command(tmp_path, "up", "--detach", "--model", str(MODEL), "--router-port", "0")
    assert up.returncode == 0, up.stdout + up.stderr
    status = json.loads(fleet_command(tmp_path, "status", "--json").stdout)
    urls = {one["name"]: one["url"] for one in status["instances"]}
    fleet = RunningFleet(
        tmp_path, status["router"]["url"], status["controller"]["url"], urls, {}, status["router"]["admin_url"]
    )
    try:
        under_load(fleet)
    finally:
        fleet_command(tmp_path, "down")


def under_load(fleet: RunningFleet) -> None:
    ended: list[Ended] = []

    async def storm() -> None:
        timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:

            async def one(number: int) -> None:
                order = Order(make_prompt(random.Random(time.monotonic_ns()), 120), True, 100)
                ended.append(await ask(session, fleet.router, MODEL.name, order, f"d{number}", DEADLINE_S))

            asking = [asyncio.create_task(one(number)) for number in range(CONCURRENCY)]
            await asyncio.to_thread(in_flight, fleet, CONCURRENCY)
            supervisor = json.loads((fleet.home / "default" / "fleet.json").read_text())["supervisor"][0]
            os.kill(supervisor, signal.SIGTERM)
            await asyncio.to_thread(wait_for, "the router stops", lambda: health(fleet) == 503, 10.0)
            async with session.post(f"{fleet.router}/v1/completions", json={"model": "m", "prompt": "x"}) as refused:
                assert refused.status == 503
                assert refused.headers["retry-after"]
                assert refused.headers["connection"] == "close"
            await asyncio.gather(*asking)

    asyncio.run(storm())
    assert [one.outcome for one in ended] == ["right"] * CONCURRENCY, ended
    wait_for("nothing of it is left", lambda: not (fleet.home / "default" / "token").exists(), 60.0)


def in_flight(fleet: RunningFleet, count: int) -> None:
    wait_for(
        "all are on their way", lambda: total(scrape(fleet.router_admin), "vllm_fleet_router_in_flight") >= count, 30.0
    )


def health(fleet: RunningFleet) -> int:
    host, _, port = fleet.router.removeprefix("http://").rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()
