"""Instances and clients that die at the wrong moment: requests are answered, blocks are freed on both sides."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from tests.conftest import RunningFleet, SharedFleets, running_fleet
from tests.integration.asking import ask_all, body
from vllm_fleet.bench.plain import post, scrape, total
from vllm_fleet.bench.recall import make_prompt

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

HOLD = {"do_remote_decode": True, "do_remote_prefill": False}


@pytest.fixture(scope="module")
def fleet(shared_fleets: SharedFleets, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFleet]:
    """Two prefill instances and one decode; short leases."""
    shared_fleets.stop()
    home = tmp_path_factory.mktemp("deaths")
    config = home / "fleet.yaml"
    config.write_text("handoff: {lease_s: 3, hold_s: 6, load_s: 3}\n")
    with running_fleet(home, "--config", str(config), "--prefill", "2") as running:
        yield running


def usage(url: str) -> float:
    """Share of KV blocks in use. vLLM updates it when it steps: a tiny request makes it."""
    post(f"{url}/v1/completions", body("x", max_tokens=1))
    return total(scrape(url), "vllm:kv_cache_usage_perc")


def wait_for(what: str, check: Any, seconds: float = 15.0) -> None:
    """Wait until ``check()`` is true."""
    until = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < until, f"{what}: not within {seconds} s"
        time.sleep(0.1)


def outcome(url: str, name: str) -> float:
    return total(scrape(url), "vllm:fleet_handoffs_total", outcome=name)


def hold(url: str, seed: int, facts: int = 150) -> tuple[Any, dict[str, Any]]:
    """Let a prefill instance hold a prompt's KV; the prompt and the parameters for decode."""
    prompt = make_prompt(random.Random(seed), facts)
    held, _ = post(f"{url}/v1/completions", {**body(prompt.text, max_tokens=1), "kv_transfer_params": HOLD})
    return prompt, held["kv_transfer_params"]


def decode_answers(fleet: RunningFleet, prompt: Any, params: dict[str, Any]) -> str:
    request = {**body(prompt.text, max_tokens=3), "kv_transfer_params": params}
    answer, _ = post(f"{fleet.decode}/v1/completions", request)
    text: str = answer["choices"][0]["text"]
    return text


def test_a_decode_that_never_comes_costs_a_lease_and_no_block(fleet: RunningFleet) -> None:
    before = usage(fleet.prefill)
    prompt, params = hold(fleet.prefill, 1)
    assert usage(fleet.prefill) > before
    wait_for("the lease ends", lambda: usage(fleet.prefill) == before, 10)
    assert total(scrape(fleet.prefill), "vllm:fleet_pins_expired_total") >= 1
    recomputed = outcome(fleet.decode, "recomputed")
    assert decode_answers(fleet, prompt, params) == prompt.value  # too late: computed again
    assert outcome(fleet.decode, "recomputed") == recomputed + 1


def test_a_client_that_leaves_in_the_middle_frees_both_sides(fleet: RunningFleet) -> None:
    before = {name: usage(fleet.urls[name]) for name in ("prefill-0", "prefill-1", "decode-0")}

    async def leave(after_s: float, seed: int) -> None:
        prompt = make_prompt(random.Random(seed), 200)
        request = body(prompt.text, max_tokens=200, ignore_eos=True, stream=True)
        timeout = aiohttp.ClientTimeout(total=after_s)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            with contextlib.suppress(TimeoutError):
                async with session.post(f"{fleet.router}/v1/completions", json=request) as response:
                    async for _ in response.content:
                        pass

    async def storm() -> None:
        rng = random.Random(0)
        for start in range(0, 40, 10):
            await asyncio.gather(*(leave(rng.uniform(0.01, 1.2), seed) for seed in range(start, start + 10)))

    asyncio.run(storm())
    for name, usual in before.items():
        wait_for(f"{name} frees its blocks", lambda name=name, usual=usual: usage(fleet.urls[name]) == usual, 20)
        assert total(scrape(fleet.urls[name]), "vllm:fleet_pins") == 0
        assert total(scrape(fleet.urls[name]), "vllm:num_requests_running") == 0


def test_a_stopped_prefill_costs_the_load_deadline(fleet: RunningFleet) -> None:
    """A hung peer is given up after handoff.load_s, and comes back unharmed."""
    prompt, params = hold(fleet.prefill, 3)
    server = psutil.Process(fleet.pids["prefill-0"])
    family = [server, *server.children(recursive=True)]
    for process in family:
        process.suspend()
    try:
        wait_for("it is stopped", lambda: all(process.status() == psutil.STATUS_STOPPED for process in family), 5)
        began = time.monotonic()
        recomputed = outcome(fleet.decode, "recomputed")
        assert decode_answers(fleet, prompt, params) == prompt.value
        assert time.monotonic() - began < 3 + 10
        assert outcome(fleet.decode, "recomputed") == recomputed + 1
    finally:
        for process in family:
            process.resume()
    wait_for("prefill-0 is ready again", lambda: states(fleet)["prefill-0"] == "ready", 15)
    prompt, params = hold(fleet.prefill, 4)
    loaded = outcome(fleet.decode, "loaded")
    assert decode_answers(fleet, prompt, params) == prompt.value
    assert outcome(fleet.decode, "loaded") == loaded + 1


def states(fleet: RunningFleet) -> dict[str, str]:
    return {instance["name"]: instance["state"] for instance in fleet.status()["instances"]}


def test_the_controller_may_die(fleet: RunningFleet) -> None:
    """The data path goes on; the controller is started again and learns the fleet anew."""
    record = (fleet.home / "default" / "fleet.json").read_text()
    pid = next(p.pid for p in psutil.process_iter(["cmdline"]) if is_controller(p, fleet.home))
    os.kill(pid, signal.SIGKILL)
    requests = [body(make_prompt(random.Random(seed), 40).text, max_tokens=3) for seed in range(30)]
    answers = ask_all(fleet.router, requests, 4)
    assert [answer.status for answer in answers] == [200] * 30
    assert {answer.handoff for answer in answers} == {"handed_off"}
    wait_for("a new controller", lambda: is_back(fleet, pid), 20)
    assert str(pid) in record


def is_controller(process: psutil.Process, home: Path) -> bool:
    words = process.info["cmdline"] or []
    return "vllm_fleet.controller" in words and any(str(home) in word for word in words)


def is_back(fleet: RunningFleet, old: int) -> bool:
    pids = [p.pid for p in psutil.process_iter(["cmdline"]) if is_controller(p, fleet.home)]
    return bool(pids) and pids != [old] and set(states(fleet).values()) == {"ready"}
