"""The client of benchmarks/gpu_serving.py: streamed completions with the time of every token, and their statistics."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.serving_device import Device
from benchmarks.serving_start import Started
from vllm_fleet.core.errors import FleetError

REQUEST_S = 60.0
KEPT_BYTES = 4096
"""The end of an answer that is looked at; its last two events are shorter."""
COUNTERS = ("vllm:fleet_", "vllm:nixl_")


class RequestFailed(FleetError):
    """An answer with an error, or none."""


@dataclass
class Stream:
    """One streamed answer, while it comes and afterwards."""

    sent: float = 0.0
    """``time.perf_counter()`` when the request was sent, as all times here."""
    at: list[float] = field(default_factory=list)
    """When each token came; afterwards without the two events that end an answer."""
    headers: Mapping[str, str] = field(default_factory=dict)
    tokens: int = 0
    """Tokens of the answer, by the server's own count."""
    cached: int = 0
    """Tokens of the prompt that the answering instance did not compute, by its own count."""

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.at[0] - self.sent

    @property
    def tpot_s(self) -> float:
        """Time per token after the first."""
        return (self.at[-1] - self.at[0]) / max(1, self.tokens - 1)

    @property
    def mode(self) -> str:
        """How the router says that it was handed over: ``streamed``, ``sequential`` or what came of it instead."""
        outcome = self.headers.get("x-fleet-handoff", "none")
        return self.headers.get("x-fleet-handoff-mode", outcome) if outcome == "handed_off" else outcome


class Events:
    """Counts server-sent events in pieces of an answer: each ends with an empty line, which a piece may cut in two."""

    def __init__(self) -> None:
        self.end = b""

    def feed(self, piece: bytes) -> int:
        """How many events end in this piece."""
        self.end, before = (self.end + piece)[-KEPT_BYTES:], self.end[-1:]
        return (before + piece).count(b"\n\n")


def _usage(event: bytes) -> dict[str, Any] | None:
    """The usage in the last event but one of an answer; None where there is an error instead."""
    found: dict[str, Any] | None = json.loads(event.removeprefix(b"data: ")).get("usage")
    return found


@dataclass
class Bench:
    """What every phase needs."""

    session: aiohttp.ClientSession
    started: Started
    device: Device
    model: Path
    rng: random.Random

    def __post_init__(self) -> None:
        vocabulary = int(json.loads((self.model / "config.json").read_text())["vocab_size"])
        self._ids = range(min(100, vocabulary // 4), vocabulary * 3 // 4)  # no special token, at either end

    def url(self, name: str) -> str:
        """Of a process that has started."""
        return self.started.urls[name]

    def body(self, tokens: int, answer: int, *, stream: bool = True) -> dict[str, Any]:
        """A greedy completion of a prompt nobody has seen; ``answer`` tokens, whatever they are."""
        made: dict[str, Any] = {
            "model": self.model.name,
            "prompt": self.rng.choices(self._ids, k=tokens),
            "max_tokens": answer,
            "temperature": 0,
            "ignore_eos": True,
        }
        if stream:
            made |= {"stream": True, "stream_options": {"include_usage": True}}
        return made

    async def stream(
        self, name: str, body: Mapping[str, Any] | bytes, into: Stream | None = None, timeout_s: float = REQUEST_S
    ) -> Stream:
        """Ask ``name`` and read the whole answer, into ``into`` where given.

        Raises:
            RequestFailed: an answer with an error, or none.
        """
        made, events = Stream() if into is None else into, Events()
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        timeout, clock = aiohttp.ClientTimeout(total=timeout_s), time.perf_counter
        made.sent = clock()
        try:
            async with self.session.post(f"{self.url(name)}/v1/completions", data=data, timeout=timeout) as answer:
                made.headers = answer.headers
                async for piece in answer.content.iter_any():
                    now = clock()
                    made.at.extend([now] * events.feed(piece))
        except (aiohttp.ClientError, OSError) as error:
            raise RequestFailed(f"{name}: {type(error).__name__}: {error}") from error
        last = events.end.split(b"\n\n")[-3:]
        usage = _usage(last[0]) if answer.status == 200 and last[1:] == [b"data: [DONE]", b""] else None
        if usage is None:
            raise RequestFailed(f"{name}: {answer.status}: {events.end[-300:].decode(errors='replace')}")
        made.tokens = usage["completion_tokens"]
        made.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        del made.at[-2:]  # the usage and [DONE]
        if not made.at:
            raise RequestFailed(f"{name}: an answer without tokens")
        return made

    async def post(self, name: str, body: Mapping[str, Any], timeout_s: float = REQUEST_S) -> dict[str, Any]:
        """Ask ``name`` for an answer in one piece. Raises RequestFailed."""
        url, timeout = f"{self.url(name)}/v1/completions", aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self.session.post(url, data=json.dumps(body).encode(), timeout=timeout) as answer:
                text = await answer.text()
        except (aiohttp.ClientError, OSError) as error:
            raise RequestFailed(f"{name}: {type(error).__name__}: {error}") from error
        if answer.status != 200:
            raise RequestFailed(f"{name}: {answer.status}: {text[:300]}")
        found: dict[str, Any] = json.loads(text)
        return found

    async def get(self, name: str, path: str) -> str:
        """What ``name`` answers to a GET, with the secret that opens the router's timelines. Raises RequestFailed."""
        headers = {"Authorization": f"Bearer {self.started.secret}"} if name == "router" else {}
        try:
            async with self.session.get(f"{self.url(name)}{path}", headers=headers) as answer:
                text = await answer.text()
        except (aiohttp.ClientError, OSError) as error:
            raise RequestFailed(f"{name}: {type(error).__name__}: {error}") from error
        if answer.status != 200:
            raise RequestFailed(f"{name}: {path}: {answer.status}")
        return text

    async def timeline(self, request_id: str) -> dict[str, float]:
        """When what happened to a request, as the router saw it: seconds since it was received."""
        found: dict[str, float] = json.loads(await self.get("router", f"/fleet/v1/requests/{request_id}"))["seconds"]
        return found

    async def counters(self) -> dict[str, float]:
        """The connectors' own counters, of every instance that has them."""
        found: dict[str, float] = {}
        for name in ("prefill", "decode", "nixl-prefill", "nixl-decode"):
            if self.started.has(name):
                read = read_counters(await self.get(name, "/metrics"))
                found |= {f"{name} {key}": value for key, value in read.items()}
        return found


def read_counters(metrics: str) -> dict[str, float]:
    """The connectors' counters (sums and counts of histograms, too) by name and own labels."""
    found: dict[str, float] = {}
    for line in metrics.splitlines():
        if line.startswith(COUNTERS) and not re.match(r"\S+?_(bucket|created)[{ ]", line):
            series, _, value = line.rpartition(" ")
            short = re.sub(r'(engine|model_name)="[^"]*",?', "", series).replace(",}", "}").replace("{}", "")
            found[short] = found.get(short, 0.0) + float(value)
    return found


def grown(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """The counters that are not what they were, by how much."""
    return {key: after[key] - before.get(key, 0.0) for key in after if after[key] != before.get(key, 0.0)}


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that ``share`` of all do not exceed; nan of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def spread(values: Sequence[float], scale: float = 1e3) -> dict[str, float]:
    """How many, median, p90, p99 and worst, in ms of seconds; of nothing: how many only."""
    shares = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0)) if values else ()
    return {"n": len(values)} | {name: round(scale * percentile(values, share), 3) for name, share in shares}


@contextlib.contextmanager
def no_pauses() -> Iterator[None]:
    """Python's garbage collector stays out of the figures of this process."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
