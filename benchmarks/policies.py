"""What a choice costs, in microseconds of one core: python -m benchmarks.policies [--out FILE]."""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.prefix_oracle import words
from vllm_fleet.bench.machine import facts as machine
from vllm_fleet.bench.mock_cache import block_hashes
from vllm_fleet.core.env import RealEnv
from vllm_fleet.core.ids import InstanceName
from vllm_fleet.router.openai import GenerateRequest, Route, parse_request
from vllm_fleet.router.policies.facts import Facts
from vllm_fleet.router.policies.making import make
from vllm_fleet.router.policies.settings import PolicyName, PolicySettings
from vllm_fleet.router.prefix.book import PrefixBook
from vllm_fleet.router.prefix.events import BlockStored

_POLICIES: tuple[PolicyName, ...] = ("round_robin", "least_load", "power_of_two", "session", "prefix")
_BLOCK_BYTES = 64
_REPEATS = 7


class Loads:
    """As the router's, without what instances say."""

    def __init__(self, names: tuple[InstanceName, ...]) -> None:
        self._loads = {str(name): 3 + number % 2 for number, name in enumerate(names)}

    def load(self, name: str) -> float:
        return self._loads[name]


def requests(prompt_bytes: int, count: int) -> list[GenerateRequest]:
    """Turns of conversations with ten applications, which make up half of each prompt."""
    found = []
    for number in range(count):
        text = words(f"app {number % 10}", prompt_bytes // 8) + words(str(number), prompt_bytes // 8)
        found.append(parse_request(Route.COMPLETIONS, json.dumps({"prompt": text, "user": f"u{number}"}).encode()))
    return found


def learn(book: PrefixBook, names: tuple[InstanceName, ...], asked: list[GenerateRequest]) -> None:
    """Each request was sent to an instance, which told its blocks."""
    for name in names:
        book.follow(name, live=True)
    for number, request in enumerate(asked):
        facts, name = Facts(request, {}), names[number % len(names)]
        book.sent(name, facts)
        hashes: list[int | bytes] = list(block_hashes(facts.prompt.text, _BLOCK_BYTES))
        if hashes:
            book.take(name, [BlockStored(hashes, None, 16, 0, facts.label)])


def cost_us(policy: PolicyName, instances: int, prompt_bytes: int, events: bool) -> float:
    """A choice and what is noted of it, in time of the core; the least of several runs."""
    names = tuple(InstanceName(f"both-{number:03}") for number in range(instances))
    loads, book = Loads(names), PrefixBook("r")
    chooser = make(policy, PolicySettings(), book, RealEnv())
    asked = requests(prompt_bytes, 500)
    if policy == "prefix" and events:
        learn(book, names, asked)
    best = float("inf")
    gc.disable()
    for _ in range(_REPEATS):
        all_facts = [Facts(request, {}) for request in asked]
        began = time.thread_time()
        for facts in all_facts:
            chosen = chooser.choose(names, loads, facts)
            assert chosen is not None
            chooser.sent(chosen, facts)
        best = min(best, time.thread_time() - began)
    gc.enable()
    return round(best / len(asked) * 1e6, 2)


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    rows: list[dict[str, Any]] = []
    for policy in _POLICIES:
        for instances in (4, 16, 256):
            for prompt_bytes in (256, 16384) if policy == "prefix" else (256,):
                for events in (False, True) if policy == "prefix" else (False,):
                    took = cost_us(policy, instances, prompt_bytes, events)
                    rows.append({"policy": policy, "instances": instances, "us": took})
                    if policy == "prefix":
                        rows[-1] |= {"prompt_bytes": prompt_bytes, "events": events}
                    print(json.dumps(rows[-1]), flush=True)
    if out is not None:
        found = {"command": "python -m benchmarks.policies", "machine": machine(), "rows": rows}
        out.write_text(json.dumps(found, default=str) + "\n")


if __name__ == "__main__":
    main()
