"""Handoffs whose instances die, hang, restart or are lied to, in a fleet of two prefill and one decode instances.

Prompts of 4,000 tokens in chunks of 64 keep a prefill instance busy for a second, two at a time: a fault meets requests
in its queue, in the middle of their prompt, and held.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import aiohttp
import pytest

from tests.conftest import SharedFleets
from tests.faults.handoffs import (
    HOLD,
    ask,
    asked,
    broken_fleet,
    counted,
    counts,
    gauge,
    holds_nothing,
    idle,
    mint,
    prompt_of,
    right,
    wait_for,
    warm,
)
from tests.integration.asking import body
from vllm_fleet.bench.gauges import read
from vllm_fleet.bench.own_fleet import OwnFleet, process_state
from vllm_fleet.bench.plain import post, scrape, total

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

LONG = 4000
SLOW = ["--max-num-batched-tokens=64", "--max-num-seqs=2"]


@pytest.fixture(scope="module")
def running(shared_fleets: SharedFleets, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnFleet]:
    shared_fleets.stop()
    args: dict[str, Any] = {"vllm_args": ["--max-model-len=6000"], "prefill_args": SLOW}
    environment = {"VLLM_SERVER_DEV_MODE": "1"}  # for /reset_prefix_cache
    home = tmp_path_factory.mktemp("faults")
    with broken_fleet(home, prefill=2, decode=1, env=environment, **args) as fleet:
        yield fleet


@pytest.fixture
def fleet(running: OwnFleet) -> OwnFleet:
    """All instances ready, whatever an earlier test has left."""
    for name in running.instances():
        if not running.pids(name):
            running.restart(name)
            warm(running, [name])
        elif any(process_state(pid) == "T" for pid in running.pids(name)):
            running.resume(name)
    running.wait_ready(running.instances())
    return running


def busy(fleet: OwnFleet, name: str) -> None:
    """Wait until an instance has requests in the middle of their prompt and others in its queue."""
    url = fleet.url(name)
    wait_for(
        f"{name} is busy", lambda: gauge(url, "num_requests_running") >= 1 and gauge(url, "num_requests_waiting") >= 1
    )


def test_prefill_is_killed_with_requests_at_every_stage(fleet: OwnFleet) -> None:
    """Queued, half computed, held: each is answered. Then it restarts at the same address, and hands over again."""
    before, decode, victim = idle(fleet), fleet.url("decode-0"), fleet.url("prefill-0")
    engine = fleet.pids("decode-0")
    assert ask(fleet.router, prompt_of(300))[0]  # decode has a connection
    held = prompt_of(300)
    answer, _ = post(f"{victim}/v1/completions", {**body(held.text, max_tokens=1), "kv_transfer_params": HOLD})
    with ThreadPoolExecutor(16) as pool:
        asking = asked(pool, fleet.router, [prompt_of(LONG) for _ in range(10)])
        busy(fleet, "prefill-0")
        assert gauge(victim, "fleet_pins") >= 1
        fleet.kill("prefill-0")
        found = right(asking)
    of_victim = [headers for headers in found if headers.get("x-fleet-prefill") == "prefill-0"]
    assert sum(headers["x-fleet-handoff"] == "prefill_failed" for headers in of_victim) >= 3
    assert {h["x-fleet-handoff"] for h in found if h.get("x-fleet-prefill") == "prefill-1"} == {"handed_off"}
    read(fleet, "decode-0")  # what it counted until now is in its metrics then
    recomputed = counted(decode, "recomputed")
    assert ask(decode, held, answer["kv_transfer_params"])[0]  # held there when it died
    counts(decode, "recomputed", recomputed + 1)
    old = fleet.members().get("prefill-0")
    fleet.restart("prefill-0")
    warm(fleet, ["prefill-0"])
    assert old is None or old.incarnation != fleet.members()["prefill-0"].incarnation
    loaded, failed = counted(decode, "loaded"), counted(decode, "recomputed")
    again, prompt = mint(fleet), prompt_of(600)
    assert ask(fleet.url("prefill-0"), prompt, again[0], max_tokens=1)[0]
    assert ask(decode, prompt, again[1])[0]
    counts(decode, "loaded", loaded + 1)
    assert counted(decode, "recomputed") == failed
    assert fleet.pids("decode-0") == engine
    holds_nothing(fleet, before)


def test_decode_is_killed_while_it_waits_and_streams(fleet: OwnFleet) -> None:
    """Prefill frees what was for it; whoever had no byte yet is answered by others, and so are the streams."""
    before = idle(fleet)
    url = f"{fleet.router}/v1/completions"
    streaming = asyncio.Event()

    async def stream(session: aiohttp.ClientSession) -> bytes:
        """The last event of a stream that decode's death cuts, and that goes on elsewhere."""
        last = b""
        request = body(prompt_of(200).text, max_tokens=1000, ignore_eos=True, stream=True)
        async with session.post(url, json=request) as response:
            async for line in response.content:
                last = line if line.startswith(b"data: ") else last
                streaming.set()
        return last

    async def storm() -> list[bytes]:
        async with aiohttp.ClientSession() as session:
            streams = [asyncio.create_task(stream(session)) for _ in range(3)]
            await asyncio.wait_for(streaming.wait(), 20)
            with ThreadPoolExecutor(8) as pool:
                # Answers long enough that decode cannot have written one when it dies.
                prompts = [prompt_of(LONG) for _ in range(8)]
                asking = asked(pool, fleet.router, prompts, max_tokens=100, ignore_eos=True)
                await asyncio.to_thread(busy, fleet, "prefill-0")
                await asyncio.to_thread(fleet.kill, "decode-0")
                found = await asyncio.to_thread(right, asking)
            assert {headers["x-fleet-decode"] for headers in found} <= {"prefill-0", "prefill-1"}
            return await asyncio.gather(*streams)

    ends = asyncio.run(asyncio.wait_for(storm(), 90))
    assert [end.strip() for end in ends] == [b"data: [DONE]"] * 3
    assert total(scrape(fleet.router_admin), "vllm_fleet_router_resumes_total", way="continue") >= 1
    holds_nothing(fleet, {name: before[name] for name in ("prefill-0", "prefill-1")})
    fleet.restart("decode-0")
    warm(fleet, ["decode-0"])
    good, headers = ask(fleet.router, prompt_of(600))
    assert good
    assert headers["x-fleet-handoff"] == "handed_off"


@pytest.mark.parametrize(("victim", "seconds"), [("prefill-0", 1.0), ("prefill-0", 5.0), ("decode-0", 5.0)])
def test_a_stopped_instance_costs_time_only(fleet: OwnFleet, victim: str, seconds: float) -> None:
    """Stopped in the middle of handoffs, for less and for more than the leases, and continued."""
    before, pids = idle(fleet), {name: fleet.pids(name) for name in fleet.instances()}
    with ThreadPoolExecutor(8) as pool:
        asking = asked(pool, fleet.router, [prompt_of(LONG) for _ in range(8)])
        busy(fleet, "prefill-0")
        fleet.stop(victim)
        with contextlib.suppress(TimeoutError):
            asyncio.run(asyncio.wait_for(asyncio.Event().wait(), seconds))
        fleet.resume(victim)
        right(asking)
    assert {name: fleet.pids(name) for name in fleet.instances()} == pids
    fleet.wait_ready([victim])
    assert ask(fleet.router, prompt_of(300))[0]
    holds_nothing(fleet, before, 20.0)


@pytest.mark.parametrize("lie", ["replayed", "another_prompt", "another_engine", "never_prefilled"])
def test_a_stream_ticket_that_does_not_fit_is_recomputed(fleet: OwnFleet, lie: str) -> None:
    before, pids = idle(fleet), {name: fleet.pids(name) for name in fleet.instances()}
    prefill, decode = fleet.url("prefill-0"), fleet.url("decode-0")
    prompt, other = prompt_of(700), prompt_of(700)
    for_prefill, for_decode = mint(fleet, **({"engine": "another"} if lie == "another_engine" else {}))
    refused = counted(prefill, "refused")
    if lie == "replayed":
        loaded = counted(decode, "loaded")
        assert ask(prefill, prompt, for_prefill, max_tokens=1)[0]
        assert ask(decode, prompt, for_decode)[0]
        counts(decode, "loaded", loaded + 1)
        assert ask(prefill, other, for_prefill, max_tokens=1)[0]
        counts(prefill, "refused", refused + 1)
    elif lie == "another_engine":
        assert ask(prefill, prompt, for_prefill, max_tokens=1)[0]
        counts(prefill, "refused", refused + 1)
    elif lie == "another_prompt":
        assert ask(prefill, prompt, for_prefill, max_tokens=1)[0]
    recomputed = counted(decode, "recomputed")
    good, _ = ask(decode, other, for_decode)
    assert good
    counts(decode, "recomputed", recomputed + 1)
    assert {name: fleet.pids(name) for name in fleet.instances()} == pids
    holds_nothing(fleet, before)


def test_a_stream_ticket_used_by_two_at_once_serves_one(fleet: OwnFleet) -> None:
    """The same transfer wanted by two requests at decode, while it is computed: both are right, one loads."""
    before, decode = idle(fleet), fleet.url("decode-0")
    for_prefill, for_decode = mint(fleet)
    prompt = prompt_of(LONG)
    loaded, recomputed = counted(decode, "loaded"), counted(decode, "recomputed")
    with ThreadPoolExecutor(3) as pool:
        asking = [
            pool.submit(ask, fleet.url("prefill-0"), prompt, for_prefill, max_tokens=1),
            pool.submit(ask, decode, prompt, for_decode, cache_salt=None),
            pool.submit(ask, decode, prompt, for_decode, cache_salt=None),
        ]
        right(asking)
    wait_for(
        "both ended",
        lambda: counted(decode, "loaded") + counted(decode, "recomputed") >= loaded + recomputed + 2,
    )
    assert counted(decode, "loaded") <= loaded + 1
    holds_nothing(fleet, before)


def test_two_hundred_clients_leave_at_random_moments(fleet: OwnFleet) -> None:
    before, rng = idle(fleet), random.Random(0)

    async def leave(session: aiohttp.ClientSession) -> None:
        request = body(prompt_of(rng.choice((300, 1500, LONG))).text, max_tokens=200, ignore_eos=True, stream=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(rng.choice((0.05, 0.5, 2.0)) * rng.random()):
                async with session.post(f"{fleet.router}/v1/completions", json=request) as response:
                    async for _ in response.content:
                        pass
        left.append(1)

    async def storm() -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            for _ in range(10):
                await asyncio.gather(*(leave(session) for _ in range(20)))

    left: list[int] = []
    asyncio.run(storm())
    assert len(left) == 200
    holds_nothing(fleet, before)
    assert ask(fleet.router, prompt_of(300))[0]


def test_prefix_caches_that_are_reset_while_kv_moves(fleet: OwnFleet) -> None:
    """Resetting takes no block from whoever uses it; where it is forced, running requests are preempted first."""
    before, lost = idle(fleet), sum(gauge(fleet.url(name), "num_preemptions_total") for name in fleet.instances())
    with ThreadPoolExecutor(8) as pool:
        for forced in ("false", "true"):
            asking = asked(pool, fleet.router, [prompt_of(LONG) for _ in range(8)])
            busy(fleet, "prefill-0")
            while not all(one.done() for one in asking):
                for name in fleet.instances():
                    reset(f"{fleet.url(name)}/reset_prefix_cache?reset_running_requests={forced}")
                wait([one for one in asking if not one.done()], timeout=0.5)
            right(asking)
    assert sum(gauge(fleet.url(name), "num_preemptions_total") for name in fleet.instances()) > lost
    assert ask(fleet.router, prompt_of(300))[0]
    holds_nothing(fleet, before)
    assert reset(f"{fleet.url('decode-0')}/reset_prefix_cache"), "nothing of the handoffs is left there"


def reset(url: str) -> bool:
    """Whether an instance dropped its prefix cache. vLLM refuses, or answers 500, while KV is on its way to it."""
    request = urllib.request.Request(url, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return bool(json.load(response)["success"])
    except urllib.error.HTTPError as error:
        if error.code != 500:
            raise
        return False
