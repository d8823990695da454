"""From which prompt length on a handoff is worth it: python -m benchmarks.handoff_threshold [--out FILE].

A fleet of one prefill and one decode instance. While decode writes a long answer, prompts of growing length come in, by
turns through the router (handed off) and straight to decode (computed there). Two things are measured for each: its own
time to first token, and how long the long answer stands still because of it. A handoff costs the first and saves the
second; it is worth it from the length on where it saves more than it costs.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import random
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.streamed import MODEL, first_token_s
from vllm_fleet.bench.machine import facts
from vllm_fleet.bench.own_fleet import OwnFleet
from vllm_fleet.bench.recall import make_prompt, prompt_tokens
from vllm_fleet.config.fleet import FleetConfig

_SETTLE_S = 0.3


@dataclass
class LongAnswer:
    """A stream that runs beside; when each of its tokens came."""

    url: str
    came: list[float] = field(default_factory=list)

    def run(self) -> None:
        """Ask for it, token by token, until it ends."""
        parts = urlsplit(self.url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=120)
        body = {"model": MODEL.name, "prompt": "A", "max_tokens": 1500, "stream": True, "ignore_eos": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        for line in connection.getresponse():
            if line.startswith(b"data: {"):
                self.came.append(time.perf_counter())

    def stood_still_s(self, since: float, until: float) -> float:
        """The longest time without a token that touches this span."""
        inside = [at for at in self.came if since - 0.1 <= at <= until + 0.1]
        return max((b - a for a, b in itertools.pairwise(inside)), default=0.0)


def prompt_of(rng: random.Random, tokens: int) -> str:
    """A prompt that nobody has seen."""
    facts_of = max(1, (tokens - 4) // 6)
    return " " * (tokens - prompt_tokens(facts_of)) + make_prompt(rng, facts_of).text


def measure(fleet: OwnFleet, lengths: list[int], rounds: int) -> dict[str, dict[int, list[tuple[float, float]]]]:
    """Way -> length -> (time to first token, the long answer's pause) of each round; the first does not count."""
    rng = random.Random(1)
    urls = {"handed_off": fleet.router, "computed": fleet.url("decode-0")}
    found: dict[str, dict[int, list[tuple[float, float]]]] = {way: {n: [] for n in lengths} for way in urls}
    for number in range(rounds + 1):
        beside = LongAnswer(fleet.url("decode-0"))
        thread = threading.Thread(target=beside.run, daemon=True)
        thread.start()
        time.sleep(_SETTLE_S)
        spans = []
        for tokens in rng.sample(lengths, len(lengths)):
            for way in rng.sample(sorted(urls), 2):
                if not thread.is_alive():
                    break
                time.sleep(_SETTLE_S / 3)
                began = time.perf_counter()
                took, handoff = first_token_s(urls[way], prompt_of(rng, tokens))
                assert handoff == ("handed_off" if way == "handed_off" else ""), handoff
                spans.append((way, tokens, took, began))
        thread.join(120)
        if number:
            for way, tokens, took, began in spans:
                found[way][tokens].append((took, beside.stood_still_s(began, began + took)))
    return found


def main() -> None:
    """Run it and print a line for each length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tokens", default="16,32,64,128,256,512,1024")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    lengths = [int(each) for each in given.tokens.split(",")]
    policy = {"port": 0, "handoff_min_tokens": 0}
    fields: dict[str, Any] = {"name": "threshold", "model": str(MODEL), "router": policy, "handoff": {"load": "always"}}
    with tempfile.TemporaryDirectory(prefix="fleet-") as home:
        fleet = OwnFleet(FleetConfig.model_validate(fields), Path(home))
        try:
            fleet.start()
            found = measure(fleet, lengths, given.rounds)
        finally:
            fleet.close()
    rows = []
    for tokens in lengths:
        row: dict[str, Any] = {"tokens": tokens}
        for way, by_length in found.items():
            if by_length[tokens]:
                row[f"{way}_ttft_ms"] = round(statistics.median(one for one, _ in by_length[tokens]) * 1e3, 2)
                row[f"{way}_pause_ms"] = round(statistics.median(one for _, one in by_length[tokens]) * 1e3, 2)
                row[f"{way}_rounds"] = len(by_length[tokens])
        rows.append(row)
        print(json.dumps(row), flush=True)
    if given.out is not None:
        command = "python -m benchmarks.handoff_threshold"
        given.out.write_text(json.dumps({"command": command, "machine": facts(), "rows": rows}, default=str) + "\n")


if __name__ == "__main__":
    main()
