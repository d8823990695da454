"""One client of the storm: asks for a known answer, perhaps leaves early, and says how it went."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp

from vllm_fleet.bench.plain import post
from vllm_fleet.bench.recall import RecallPrompt, make_prompt

FACTS = (2, 20, 60, 120, 200, 280)
"""Of the prompts: 16 to 1,684 tokens."""
GRACE_S = 2.0
"""An answer may be this late, after the deadline the router keeps; then the request hangs."""

Outcome = Literal["right", "left", "cut", "no_answer", "wrong", "hung", "broken"]
"""``left``: the client did. ``cut``: a typed error after the first byte. ``no_answer``: a typed error before it.
``broken``: an end that promises nothing, such as a connection that closes."""


@dataclass(frozen=True)
class Order:
    """One request, and when its client leaves: after so long, after so many events, or not at all."""

    prompt: RecallPrompt
    stream: bool
    max_tokens: int
    leave_after_s: float | None = None
    leave_after_events: int | None = None


@dataclass(frozen=True)
class Ended:
    """How a request ended; seconds on time.monotonic()'s clock."""

    name: str
    outcome: Outcome
    began_s: float
    ended_s: float
    decode: str | None = None
    handoff: str | None = None
    detail: str = ""
    """The error; of a wrong answer its beginning."""
    order: Order | None = None
    """What was asked, for a wrong answer."""


def draw(rng: random.Random, leave_share: float) -> Order:
    """A random request: two of three stream, a third of these long; some clients leave at a random moment."""
    prompt = make_prompt(rng, rng.choice(FACTS))
    stream = rng.random() < 2 / 3
    max_tokens = rng.choice((3, 3, 80)) if stream else rng.choice((3, 12))
    if rng.random() >= leave_share:
        return Order(prompt, stream, max_tokens)
    if stream and rng.random() < 0.4:
        return Order(prompt, stream, 80, leave_after_events=rng.randrange(1, 40))
    return Order(prompt, stream, max_tokens, leave_after_s=rng.choice((0.02, 0.1, 0.5, 1.5)) * rng.random())


async def ask(
    session: aiohttp.ClientSession, router: str, model: str, order: Order, name: str, deadline_s: float
) -> Ended:
    """Send one request to the router, as ``name``, and see it through."""
    body = {
        "model": model, "prompt": order.prompt.text, "temperature": 0, "max_tokens": order.max_tokens,
        "stream": order.stream, "ignore_eos": order.max_tokens > 12,
    }  # fmt: skip
    url, named = f"{router}/v1/completions", {"X-Request-Id": name}
    began = time.monotonic()
    patience_s = deadline_s + GRACE_S if order.leave_after_s is None else order.leave_after_s
    seen: dict[str, str | None] = {}

    def ended(outcome: Outcome, detail: str = "") -> Ended:
        kept = order if outcome == "wrong" else None
        return Ended(name, outcome, began, time.monotonic(), seen.get("decode"), seen.get("handoff"), detail, kept)

    try:
        async with asyncio.timeout(patience_s), session.post(url, json=body, headers=named) as response:
            seen["decode"] = response.headers.get("x-fleet-decode")
            seen["handoff"] = response.headers.get("x-fleet-handoff")
            if response.status != 200:
                return ended(*_typed("no_answer", response.status, await response.read()))
            if not order.stream:
                text = json.loads(await response.read())["choices"][0]["text"]
                return ended(*_checked(order, text))
            return ended(*await _follow(response, order))
    except TimeoutError:
        if order.leave_after_s is not None:
            return ended("left")
        return ended("hung", f"no end after {patience_s:.0f} s")
    except (aiohttp.ClientError, OSError, ValueError, KeyError) as error:
        return ended("broken", f"{type(error).__name__}: {error}")


async def _follow(response: aiohttp.ClientResponse, order: Order) -> tuple[Outcome, str]:
    """Take a stream's events until it ends, or until its client has had enough."""
    text, events = "", 0
    async for line in response.content:
        if not line.startswith(b"data: "):
            continue
        payload = line[6:].strip()
        if payload == b"[DONE]":
            return _checked(order, text)
        told: dict[str, Any] = json.loads(payload)
        if "error" in told:
            return _typed("cut" if events else "no_answer", response.status, payload)
        text += "".join(choice["text"] for choice in told["choices"])
        events += 1
        if order.leave_after_events is not None and events >= order.leave_after_events:
            return "left", ""
    return "broken", f"the stream ended after {events} events without [DONE]"


def _checked(order: Order, text: str) -> tuple[Outcome, str]:
    if text[:3] == order.prompt.value:
        return "right", ""
    return "wrong", text[:3]


def alone(instance: str, model: str, order: Order, salt: str) -> str:
    """What an instance answers that computes the prompt itself, out of no cache: the model itself errs at times."""
    body = {"model": model, "prompt": order.prompt.text, "temperature": 0, "max_tokens": 3, "cache_salt": salt}
    answer, _ = post(f"{instance}/v1/completions", body)
    text: str = answer["choices"][0]["text"]
    return text[:3]


def _typed(outcome: Outcome, status: int, body: bytes) -> tuple[Outcome, str]:
    """``outcome`` when the error is one that the API promises."""
    try:
        error = json.loads(body)["error"]
        return outcome, f"{status} {error['code']}: {error['message']}"
    except (ValueError, KeyError, TypeError):
        return "broken", f"status {status} with {body[:200]!r}"
