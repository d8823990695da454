"""A fleet answers what one plain instance answers, however its instances are cut and whatever their caches hold."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Any

import pytest

from tests.conftest import MODEL, RunningFleet, SharedFleets
from tests.integration.asking import Answer, ask_all, body
from vllm_fleet.bench.plain import plain_instance, post, scrape, total
from vllm_fleet.bench.recall import facts_for_tokens, make_prompt, prompt_tokens

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

NOISE = 0.06
HOLD = {"do_remote_decode": True, "do_remote_prefill": False}
CHUNK = "--max-num-batched-tokens=256"
FACTS_MAX = 286  # of the recall task; longer prompts have spaces in front, a token each


def prompt_of(rng: random.Random, tokens: int) -> str:
    facts = min(facts_for_tokens(tokens), FACTS_MAX)
    return " " * (tokens - prompt_tokens(facts)) + make_prompt(rng, facts).text


def short_requests() -> list[dict[str, Any]]:
    """40 greedy requests of a few blocks and a bit, streamed and not."""
    rng = random.Random(41)
    lengths = [22, 127, 128, 129, 255, 256, 257, 640, 897, 1490] + [rng.randint(22, 1490) for _ in range(30)]
    return [
        body(prompt_of(rng, tokens), max_tokens=rng.choice([1, 3, 9]), stream=index % 2 == 0)
        for index, tokens in enumerate(lengths)
    ]


def long_requests() -> list[dict[str, Any]]:
    """Up to 8k tokens: 32 chunks of 256."""
    rng = random.Random(42)
    return [body(prompt_of(rng, tokens), max_tokens=5) for tokens in (2000, 4097, 8000)]


def shared_prefix_requests() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Prompts in pairs that share a long beginning: the first of each pair, and the second."""
    rng = random.Random(43)
    firsts, seconds = [], []
    for _ in range(6):
        beginning = prompt_of(rng, 700)
        firsts.append(body(beginning, max_tokens=3))
        seconds.append(body(beginning + make_prompt(rng, 40).text, max_tokens=5))
    return firsts, seconds


@dataclass(frozen=True)
class Reference:
    """What one plain instance answers."""

    short: list[Answer]
    long: list[Answer]
    seconds: list[Answer]


@pytest.fixture(scope="module")
def reference(shared_fleets: SharedFleets, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    shared_fleets.stop()
    with plain_instance(MODEL, tmp_path_factory.mktemp("plain") / "plain.log", ["--max-model-len=16384"]) as url:
        return Reference(
            ask_all(url, short_requests()), ask_all(url, long_requests()), ask_all(url, shared_prefix_requests()[1])
        )


def equal(answers: list[Answer], wanted: list[Answer]) -> None:
    for index, (answer, other) in enumerate(zip(answers, wanted, strict=True)):
        assert answer.status == 200, (index, answer.raw)
        assert answer.tokens == other.tokens, index
        assert answer.text == other.text, index
        assert answer.finish == other.finish, index
        assert answer.logprobs == pytest.approx(other.logprobs, abs=NOISE), index


def counted(urls: list[str], outcome: str) -> float:
    return sum(total(scrape(url), "vllm:fleet_handoffs_total", outcome=outcome) for url in urls)


def settled(urls: list[str], outcome: str, at_least: float, seconds: float = 10.0) -> float:
    """The counter once it has reached ``at_least``: an instance's metrics follow its answers by a step."""
    until = time.monotonic() + seconds
    while (found := counted(urls, outcome)) < at_least and time.monotonic() < until:
        time.sleep(0.1)
    return found


@pytest.fixture(params=["streamed 1-2", "streamed 2-1", "sequential 2-2"])
def cut_fleet(request: pytest.FixtureRequest, shared_fleets: SharedFleets, reference: Reference) -> RunningFleet:
    """Prefill and decode of these tensor-parallel sizes, prompts computed in chunks of 256 tokens."""
    mode, sizes = request.param.split()
    prefill, decode = sizes.split("-")
    return shared_fleets.configured(
        f"{mode}-{sizes}",
        f"vllm_args: [{CHUNK}]\nrouter: {{handoff: {mode}}}\n"
        f'prefill_args: [-tp, "{prefill}"]\ndecode_args: [-tp, "{decode}"]\n'
        "handoff: {lease_s: 300, prefill_s: 300, load_s: 60, load: always}\n",
    )


def test_unequal_tensor_parallel_sizes(cut_fleet: RunningFleet, reference: Reference) -> None:
    answers = ask_all(cut_fleet.router, short_requests(), 8)
    equal(answers, reference.short)
    assert {answer.handoff for answer in answers} == {"handed_off"}
    assert settled([cut_fleet.decode], "loaded", len(answers)) == len(answers)
    assert counted([cut_fleet.decode], "recomputed") == 0


@pytest.fixture
def many(shared_fleets: SharedFleets, reference: Reference) -> RunningFleet:
    """Two prefill and two decode instances."""
    return shared_fleets.configured(
        "many",
        f"prefill: 2\ndecode: 2\nvllm_args: [{CHUNK}, --max-model-len=16384]\n"
        "handoff: {load: always, lease_s: 120}\n",
    )


def decodes(fleet: RunningFleet) -> list[str]:
    return [url for name, url in fleet.urls.items() if name.startswith("decode")]


def prefills(fleet: RunningFleet) -> list[str]:
    return [url for name, url in fleet.urls.items() if name.startswith("prefill")]


def test_two_by_two_at_concurrency_64(many: RunningFleet, reference: Reference) -> None:
    before = counted(decodes(many), "loaded")
    asked, wanted = short_requests() * 4, reference.short * 4
    answers = ask_all(many.router, asked, 64)
    equal(answers, wanted)
    assert {answer.handoff for answer in answers} == {"handed_off"}
    local = counted(decodes(many), "local")
    assert settled(decodes(many), "loaded", before + len(asked) - local) == before + len(asked) - local
    assert counted(decodes(many), "recomputed") == 0
    for url in decodes(many):
        assert counted([url], "loaded") > 0, url
    for url in prefills(many):
        assert counted([url], "held") > 0, url


def test_every_prefill_hands_to_every_decode(many: RunningFleet) -> None:
    """The router's choices may leave a pair out, so each is asked for by hand. A link is made once and kept."""
    rng = random.Random(44)
    for _ in range(2):
        for prefill in prefills(many):
            for decode in decodes(many):
                prompt = make_prompt(rng, 60)
                held, _ = post(f"{prefill}/v1/completions", body(prompt.text, max_tokens=1, kv_transfer_params=HOLD))
                answer, _ = post(
                    f"{decode}/v1/completions",
                    body(prompt.text, max_tokens=3, kv_transfer_params=held["kv_transfer_params"]),
                )
                assert answer["choices"][0]["text"] == prompt.value
    links = [line for name in ("decode-0", "decode-1") for line in many.log(name).splitlines() if "link.chosen" in line]
    assert len(links) == 4, links
    assert counted(decodes(many), "recomputed") == 0


def test_long_prompts_in_chunks(many: RunningFleet, reference: Reference) -> None:
    answers = ask_all(many.router, long_requests(), 3)
    equal(answers, reference.long)
    assert {answer.handoff for answer in answers} == {"handed_off"}


@pytest.mark.parametrize("warm", ["prefill", "decode", "both"])
def test_prefixes_in_the_caches(many: RunningFleet, reference: Reference, warm: str) -> None:
    """Only the KV that decode lacks is moved, and answers stay the same."""
    firsts, seconds = shared_prefix_requests()
    salted = [{**request, "cache_salt": f"warm {warm}"} for request in firsts]  # apart from what other tests leave
    if warm in ("prefill", "both"):
        for url in prefills(many):
            ask_all(url, salted, 3)
    if warm in ("decode", "both"):
        for url in decodes(many):
            ask_all(url, salted, 3)
    moved_before = sum(total(scrape(url), "vllm:fleet_handoff_bytes_total") for url in decodes(many))
    hits_before = sum(total(scrape(url), "vllm:prefix_cache_hits_total") for url in prefills(many))
    loaded_before = counted(decodes(many), "loaded")
    answers = ask_all(many.router, [{**request, "cache_salt": f"warm {warm}"} for request in seconds], 3)
    equal(answers, reference.seconds)
    assert settled(decodes(many), "loaded", loaded_before + len(seconds)) == loaded_before + len(seconds)
    moved = sum(total(scrape(url), "vllm:fleet_handoff_bytes_total") for url in decodes(many)) - moved_before
    hits = sum(total(scrape(url), "vllm:prefix_cache_hits_total") for url in prefills(many)) - hits_before
    block = 4 * 64 * 1024  # four layers
    whole = sum(-(-int(answer.raw["usage"]["prompt_tokens"]) // 128) for answer in answers) * block
    cached = 5 * len(seconds) * block  # 700 tokens begin with five whole blocks
    assert moved == (whole - cached if warm in ("decode", "both") else whole)
    assert hits == (5 * 128 * len(seconds) if warm in ("prefill", "both") else 0)
