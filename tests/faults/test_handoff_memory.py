"""Handoffs where KV blocks are short on both sides, and with a decode instance whose KV is of another kind.

40 blocks each: three prompts of 1,684 tokens do not fit. Prefill takes up to four prompts at a time, 128 tokens of each
per step, without asking first whether all of a prompt will fit: so they take blocks from one another (preemption).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

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
)
from tests.integration.asking import body
from vllm_fleet.bench.gauges import read
from vllm_fleet.bench.own_fleet import OwnFleet
from vllm_fleet.bench.plain import post, scrape, total

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

FULL = 1684
SMALL = ["--num-gpu-blocks-override=40", "--max-model-len=2048", "--max-num-batched-tokens=512"]
GREEDY = ["--long-prefill-token-threshold=128", "--no-scheduler-reserve-full-isl"]


@pytest.fixture(scope="module")
def fleet(shared_fleets: SharedFleets, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnFleet]:
    """One prefill, one decode like it, and one decode that keeps its KV in another type."""
    shared_fleets.stop()
    args = {"vllm_args": SMALL, "prefill_args": GREEDY}
    odd = ["--dtype=float32"]
    home = tmp_path_factory.mktemp("memory")
    with broken_fleet(home, odd_decode_args=odd, prefill=1, decode=2, **args) as running:
        yield running


def preemptions(fleet: OwnFleet, name: str) -> float:
    return total(scrape(fleet.url(name)), "vllm:num_preemptions_total")


def test_blocks_that_prefill_loses_while_they_are_read(fleet: OwnFleet) -> None:
    """Preempted on prefill: decode throws away what it has read and computes the prompt itself."""
    before, lost = idle(fleet), preemptions(fleet, "prefill-0")
    recomputed = counted(fleet.url("decode-0"), "recomputed")
    with ThreadPoolExecutor(12) as pool:
        for _ in range(2):
            right(asked(pool, fleet.router, [prompt_of(FULL) for _ in range(12)]))
    wait_for("prefill preempts", lambda: preemptions(fleet, "prefill-0") > lost)
    counts(fleet.url("decode-0"), "recomputed", recomputed + 1)
    holds_nothing(fleet, before)


@pytest.mark.parametrize("short", ["prefill", "decode", "both"])
def test_no_blocks_left_is_a_wait_and_no_deadlock(fleet: OwnFleet, short: str) -> None:
    """32 requests at once while pins fill prefill, or long answers fill decode: all are answered."""
    before, began = idle(fleet), time.monotonic()
    prefill, decode = fleet.url("prefill-0"), fleet.url("decode-0")
    with ThreadPoolExecutor(40) as pool:
        blocking = []
        if short in ("prefill", "both"):
            for _ in range(2):  # nobody ever comes for these: they stay for a lease
                request = {**body(prompt_of(FULL).text, max_tokens=1), "kv_transfer_params": HOLD}
                blocking.append(pool.submit(post, f"{prefill}/v1/completions", request))
            wait_for("prefill is full", lambda: read(fleet, "prefill-0").reserved >= 28)
        if short in ("decode", "both"):
            for _ in range(4):
                endless = body(prompt_of(FULL).text, max_tokens=300, ignore_eos=True)
                blocking.append(pool.submit(post, f"{decode}/v1/completions", endless))
            wait_for("decode is full", lambda: gauge(decode, "kv_cache_usage_perc") >= 0.6)
        found = right(asked(pool, fleet.router, [prompt_of(FULL) for _ in range(32)]))
        for one in blocking:
            one.result(60.0)
    assert time.monotonic() - began < 60, "router.request_timeout_s bounds every one of them"
    assert len(found) == 32
    holds_nothing(fleet, before)


def test_a_client_that_leaves_during_a_load_harms_nobody(fleet: OwnFleet) -> None:
    """The blocks it was to be loaded into are somebody else's soon: with 40 of them, at once."""
    before, rng = idle(fleet), random.Random(5)
    prefill, decode = fleet.url("prefill-0"), fleet.url("decode-0")

    async def leave(after_s: float) -> bool:
        """Whether the client left before the answer came."""
        prompt = prompt_of(FULL)
        for_prefill, for_decode = mint(fleet)
        first = {**body(prompt.text, max_tokens=1), "kv_transfer_params": for_prefill}
        second = {**body(prompt.text, max_tokens=3), "kv_transfer_params": for_decode}
        async with aiohttp.ClientSession() as session:

            async def post_one(url: str, request: object) -> None:
                async with session.post(f"{url}/v1/completions", json=request) as response:
                    await response.read()

            try:
                async with asyncio.timeout(after_s):
                    await asyncio.gather(post_one(prefill, first), post_one(decode, second))
            except TimeoutError:
                return True
        return False

    left, most_s = 0, 0.3
    with ThreadPoolExecutor(2) as pool:
        for _ in range(20):
            if asyncio.run(leave(rng.uniform(0.01, most_s))):
                left += 1
            else:
                most_s = max(0.02, 0.8 * most_s)  # a quick machine answers sooner than most would leave
            right(asked(pool, fleet.router, [prompt_of(FULL) for _ in range(2)]))
    assert left >= 10
    holds_nothing(fleet, before)


def test_instances_with_different_kv_are_never_paired(fleet: OwnFleet) -> None:
    """The router keeps them apart; told to all the same, decode refuses, says why, and answers rightly."""
    before, odd = idle(fleet), fleet.url("decode-1")
    for_prefill, for_decode = mint(fleet)
    prompt = prompt_of(600)
    recomputed = counted(odd, "recomputed")
    assert ask(fleet.url("prefill-0"), prompt, for_prefill, max_tokens=1)[0]
    assert ask(odd, prompt, for_decode)[0]
    counts(odd, "recomputed", recomputed + 1)
    assert "dtype: 'torch.float32' here, 'torch.bfloat16' there" in fleet.log("decode-1")
    with ThreadPoolExecutor(8) as pool:
        found = right(asked(pool, fleet.router, [prompt_of(300) for _ in range(8)]))
    assert {headers["x-fleet-decode"] for headers in found} == {"decode-0"}
    fleet.stop("decode-0")
    try:
        wait_for("decode-0 is suspect", lambda: fleet.members()["decode-0"].state == "suspect")
        seen = [ask(fleet.router, prompt_of(300)) for _ in range(3)]
    finally:
        fleet.resume("decode-0")
    assert all(good for good, _ in seen)
    assert {headers["x-fleet-handoff"] for _, headers in seen[-1:]} == {"skipped:no_pair"}
    assert seen[-1][1]["x-fleet-decode"] == "decode-1"
    fleet.wait_ready(["decode-0"])
    holds_nothing(fleet, before)
