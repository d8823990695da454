"""Routing by prefix with real instances: the KV events they publish, the labels they repeat, and what comes of it."""

from __future__ import annotations

import os
import random
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import MODEL
from vllm_fleet.bench.own_fleet import OwnFleet
from vllm_fleet.bench.plain import post, scrape, total
from vllm_fleet.bench.recall import make_prompt
from vllm_fleet.config.fleet import FleetConfig
from vllm_fleet.core import limits

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

BLOCKS = "vllm_fleet_router_prefix_blocks"
TEXT = "vllm_fleet_router_prefix_text_bytes"
LEARNT = "vllm_fleet_router_prefix_learnt_total"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnFleet]:
    config = FleetConfig.model_validate(
        {
            "name": "by-prefix",
            "model": str(MODEL),
            "prefill": 0,
            "decode": 0,
            "both": 2,
            "vllm_args": ["--block-size", "32"],
            "env": {"VLLM_SERVER_DEV_MODE": "1"},  # for /reset_prefix_cache
            "router": {"port": 0, "policy": {"decode": "prefix"}},
        }
    )
    running = OwnFleet(config, tmp_path_factory.mktemp("run"))
    running.start()
    try:
        time.sleep(limits.SLOW_START_S)  # whoever was ready last gets its share little by little; nothing tells the end
        yield running
    finally:
        running.close()


def ask(fleet: OwnFleet, prompt: str) -> tuple[str, str]:
    """The answer, and who gave it."""
    body = {"model": MODEL.name, "prompt": prompt, "max_tokens": 20, "temperature": 0}
    answer, headers = post(f"{fleet.router}/v1/completions", body)
    return answer["choices"][0]["text"], headers["x-fleet-decode"]


def held(fleet: OwnFleet) -> dict[str, float]:
    page = scrape(fleet.router_admin)
    return {name: total(page, BLOCKS, instance=name) for name in fleet.instances()}


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not done():
        assert time.monotonic() < end, "it did not happen within 30 s"
        time.sleep(0.05)


def fill(fleet: OwnFleet, rng: random.Random) -> None:
    """Ask something new until every instance holds KV of something."""

    def filled() -> bool:
        ask(fleet, make_prompt(rng, 100).text)
        return all(held(fleet).values())

    until(filled)


def test_conversations_stay_where_their_kv_is_and_events_say_where(fleet: OwnFleet) -> None:
    rng = random.Random(7)
    texts: list[str] = []
    homes: list[str] = []
    while len(texts) < 4:
        text = make_prompt(rng, 60).text
        answer, name = ask(fleet, text)
        texts.append(text + answer)
        homes.append(name)
        until(lambda: total(scrape(fleet.router_admin), LEARNT) >= len(texts))
    assert set(homes) == set(fleet.instances()), "nothing in common: both get their share"
    for turn in range(2):
        for index, home in enumerate(homes):
            texts[index] += f" {turn}"
            answer, name = ask(fleet, texts[index])
            assert name == home
            texts[index] += answer
    hits = {name: total(scrape(fleet.url(name)), "vllm:prefix_cache_hits_total") for name in fleet.instances()}
    assert all(hits.values()), hits
    assert all(held(fleet).values())


def test_what_an_instance_forgot_draws_nobody_there(fleet: OwnFleet) -> None:
    rng = random.Random(8)
    fill(fleet, rng)
    text = make_prompt(rng, 100).text
    _, home = ask(fleet, text)
    (other,) = set(fleet.instances()) - {home}
    until(lambda: held(fleet)[home] > 0)
    reset = urllib.request.Request(f"{fleet.url(home)}/reset_prefix_cache", method="POST")
    with urllib.request.urlopen(reset, timeout=30) as answer:
        assert answer.status == 200
    # It is told with the engine's next step; a prompt of less than a block leaves nothing behind.
    post(f"{fleet.url(home)}/v1/completions", {"model": MODEL.name, "prompt": "A", "max_tokens": 1})
    until(lambda: held(fleet)[home] == 0)
    assert total(scrape(fleet.router_admin), TEXT, instance=home) == 0
    assert held(fleet)[other] > 0, "the other one was not asked to forget"


def test_a_router_that_starts_later_is_told_what_was_said_before(fleet: OwnFleet) -> None:
    ask(fleet, make_prompt(random.Random(10), 100).text)
    until(lambda: sum(held(fleet).values()) > 0)
    before = held(fleet)
    fleet.kill("router")
    fleet.launch("router")
    fleet.wait_ready(fleet.instances())
    until(lambda: held(fleet) == before)


def test_sockets_are_for_the_owner_alone(fleet: OwnFleet) -> None:
    line = fleet.log(fleet.instances()[0])
    assert "tcp://*" not in line
    told = next(arg for arg in fleet.specs[fleet.instances()[0]].argv if "replay_endpoint" in arg)
    folder = Path(told.split("ipc://")[1].split('"')[0]).parent
    assert os.stat(folder).st_mode & 0o077 == 0
    assert {"kv-events", "kv-replay"} <= {each.name for each in folder.iterdir()}
