"""A fleet answers what one plain vLLM instance answers: token for token, over cma and over tcp, streamed or not."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Any

import pytest

from tests.conftest import MODEL, RunningFleet
from tests.integration.asking import Answer, ask_all, body
from vllm_fleet.bench.plain import plain_instance, post, scrape, total
from vllm_fleet.bench.recall import RecallPrompt, facts_for_tokens, make_prompt, prompt_tokens

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

BLOCK = 128
NOISE = 0.06
"""Logprobs computed in another batch differ by bf16 rounding: 8 bits of mantissa on logits of up to 16."""


def padded(prompt: RecallPrompt, facts: int, tokens: int) -> str:
    """The prompt, brought to exactly ``tokens`` tokens with spaces in front (a token each)."""
    return " " * (tokens - prompt_tokens(facts)) + prompt.text


def exact_lengths() -> list[int]:
    """Shorter than a block, exactly n blocks, n blocks - 1 and + 1; up to several chunks of prefill."""
    return [22, 64, 127, *(n * BLOCK + d for n in (1, 2, 3, 5, 8, 11) for d in (-1, 0, 1))]


def requests() -> tuple[list[dict[str, Any]], list[RecallPrompt]]:
    """220 requests that differ in length, sampling and streaming."""
    rng = random.Random(20)
    made, prompts = [], []
    lengths = exact_lengths() * 4 + [rng.randint(22, 1490) for _ in range(220 - 4 * len(exact_lengths()))]
    for index, tokens in enumerate(lengths):
        facts = facts_for_tokens(tokens)
        prompt = make_prompt(rng, facts)
        settings: dict[str, Any] = {"max_tokens": rng.choice([1, 3, 9, 17]), "stream": index % 3 == 0}
        if index % 5 == 4:
            settings |= {"temperature": 0.8, "seed": index, "top_p": 0.9}
        made.append(body(padded(prompt, facts, tokens), **settings))
        prompts.append(prompt)
    return made, prompts


CHAT = make_prompt(random.Random(5), 30)


def chat_request() -> dict[str, Any]:
    messages = [{"role": "user", "content": CHAT.text}]
    return {"model": MODEL.name, "messages": messages, "max_tokens": 9, "temperature": 0}


@dataclass(frozen=True)
class Reference:
    """What one plain instance, without any connector, answers."""

    completions: list[Answer]
    chat: str


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Seeded requests go alone: vLLM 0.32 on CPU dies of one whose prefill comes in chunks."""
    asked = requests()[0]
    seeded = [request for request in asked if "seed" in request]
    others = [request for request in asked if "seed" not in request]
    with plain_instance(MODEL, tmp_path_factory.mktemp("plain") / "plain.log") as url:
        answers = {id(request): answer for request, answer in zip(others, ask_all(url, others), strict=True)}
        answers |= {id(request): answer for request, answer in zip(seeded, ask_all(url, seeded, 1), strict=True)}
        chat, _ = post(f"{url}/v1/chat/completions", chat_request())
    return Reference([answers[id(request)] for request in asked], chat["choices"][0]["message"]["content"])


def test_one_plain_instance_is_always_right(reference: Reference) -> None:
    """The oracle itself: every greedy answer, to prompts of 22 to 1,490 tokens, is the one that the facts say."""
    asked, prompts = requests()
    for request, prompt, answer in zip(asked, prompts, reference.completions, strict=True):
        if request["temperature"] == 0:
            assert answer.text.startswith(prompt.value[: request["max_tokens"]]), request["prompt"]


@pytest.mark.parametrize("transport", ["cma", "tcp"])
def test_equal_to_one_instance(transport: str, reference: Reference, request: pytest.FixtureRequest) -> None:
    fleet: RunningFleet = request.getfixturevalue(f"{transport}_fleet")
    asked, prompts = requests()
    before = scrape(fleet.decode)
    answers = ask_all(fleet.router, asked)
    for index, (answer, wanted) in enumerate(zip(answers, reference.completions, strict=True)):
        assert answer.status == 200, (index, answer.raw)
        assert answer.handoff == "handed_off", (index, answer.handoff)
        assert answer.tokens == wanted.tokens, (index, asked[index]["prompt"][-60:])
        assert answer.text == wanted.text
        assert answer.finish == wanted.finish
        assert answer.logprobs == pytest.approx(wanted.logprobs, abs=NOISE), index
        if asked[index]["temperature"] == 0:
            length = asked[index]["max_tokens"]
            assert answer.text.startswith(prompts[index].value[:length]), index
    after = scrape(fleet.decode)
    loaded = total(after, "vllm:fleet_handoffs_total", outcome="loaded") - total(
        before, "vllm:fleet_handoffs_total", outcome="loaded"
    )
    moved = [total(m, "vllm:fleet_handoff_bytes_total", transport=transport) for m in (before, after)]
    assert loaded == len(asked)
    assert moved[1] > moved[0]
    assert total(after, "vllm:fleet_handoffs_total", outcome="recomputed") == 0


def test_decode_computes_one_token_of_a_prompt(cma_fleet: RunningFleet) -> None:
    """Its own counters: every token of the prompt came from outside; vLLM computes only the last one again."""
    prompt = make_prompt(random.Random(99), 150)
    tokens = prompt_tokens(150)
    before = scrape(cma_fleet.decode)
    answer, headers = post(f"{cma_fleet.router}/v1/completions", body(prompt.text, max_tokens=3))
    assert headers["x-fleet-handoff"] == "handed_off"
    assert answer["choices"][0]["text"] == prompt.value
    after = scrape(cma_fleet.decode)

    def grown(name: str, **labels: str) -> float:
        return total(after, name, **labels) - total(before, name, **labels)

    assert grown("vllm:external_prefix_cache_hits_total") == tokens
    assert grown("vllm:prompt_tokens_by_source_total", source="local_compute") <= 1
    blocks, layers, block_bytes = -(-tokens // BLOCK), 4, 2 * BLOCK * 2 * 64 * 2
    assert grown("vllm:fleet_handoff_bytes_total") == blocks * layers * block_bytes


def test_a_chat(cma_fleet: RunningFleet, reference: Reference) -> None:
    answer, headers = post(f"{cma_fleet.router}/v1/chat/completions", chat_request())
    assert headers["x-fleet-handoff"] == "handed_off"
    text = answer["choices"][0]["message"]["content"]
    assert text == reference.chat
    assert text.startswith(CHAT.value)


def test_a_repeated_prompt_moves_only_what_decode_lacks(cma_fleet: RunningFleet) -> None:
    prompt = make_prompt(random.Random(6), 60)  # 364 tokens: two full blocks, and 108 tokens of a third
    first, _ = post(f"{cma_fleet.router}/v1/completions", body(prompt.text, max_tokens=3))
    time.sleep(0.3)
    before = total(scrape(cma_fleet.decode), "vllm:fleet_handoff_bytes_total")
    second, _ = post(f"{cma_fleet.router}/v1/completions", body(prompt.text, max_tokens=3))
    time.sleep(0.3)
    moved = total(scrape(cma_fleet.decode), "vllm:fleet_handoff_bytes_total") - before
    assert first["choices"][0]["text"] == second["choices"][0]["text"] == prompt.value
    assert moved == 4 * 64 * 1024  # one block in each of four layers
