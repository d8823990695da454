"""Asking real servers many things at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.conftest import MODEL

TIMEOUT = aiohttp.ClientTimeout(total=240)


@dataclass
class Answer:
    """One completion: its text, the logprob of each token, its usage and how it was handed off."""

    status: int
    text: str = ""
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str | None = None
    handoff: str | None = None
    raw: dict[str, Any] = field(default_factory=dict)


def body(prompt: str, **settings: Any) -> dict[str, Any]:
    """A completion request at temperature 0, unless told otherwise."""
    return {"model": MODEL.name, "prompt": prompt, "temperature": 0, "logprobs": 1, **settings}


async def ask(session: aiohttp.ClientSession, url: str, request: dict[str, Any]) -> Answer:
    """Send one completion, streamed or not."""
    async with session.post(f"{url}/v1/completions", json=request) as response:
        handoff = response.headers.get("x-fleet-handoff")
        if response.status != 200:
            return Answer(response.status, handoff=handoff, raw=await response.json())
        if not request.get("stream"):
            answered = await response.json()
            return collect([answered["choices"][0]], handoff, answered)
        lines = [line async for line in response.content]
    events = [line[6:].strip() for line in lines if line.startswith(b"data: ")]
    assert events[-1] == b"[DONE]", events[-1]
    chunks = [json.loads(event) for event in events[:-1]]
    return collect([chunk["choices"][0] for chunk in chunks if chunk["choices"]], handoff, chunks[0])


def collect(choices: list[dict[str, Any]], handoff: str | None, raw: dict[str, Any]) -> Answer:
    """One Answer out of the choice, or the choices of all chunks."""
    answer = Answer(200, handoff=handoff, raw=raw)
    for choice in choices:
        answer.text += choice["text"]
        answer.finish = choice["finish_reason"] or answer.finish
        if choice.get("logprobs"):
            answer.tokens += choice["logprobs"]["tokens"]
            answer.logprobs += choice["logprobs"]["token_logprobs"]
    return answer


async def _ask_all(url: str, requests: Sequence[dict[str, Any]], concurrency: int) -> list[Answer]:
    limit = asyncio.Semaphore(concurrency)
    connector = aiohttp.TCPConnector(limit=concurrency)
    async with aiohttp.ClientSession(timeout=TIMEOUT, connector=connector) as session:

        async def one(request: dict[str, Any]) -> Answer:
            async with limit:
                return await ask(session, url, request)

        return await asyncio.gather(*(one(request) for request in requests))


def ask_all(url: str, requests: Sequence[dict[str, Any]], concurrency: int = 32) -> list[Answer]:
    """Send all, ``concurrency`` at a time; answers in order."""
    return asyncio.run(_ask_all(url, requests, concurrency))
