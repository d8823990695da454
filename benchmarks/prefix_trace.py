"""Cache hits of routers on a shared-prefix, multi-turn trace: ours, vllm-router's, and the best possible.

    python -m benchmarks.prefix_trace --out docs/benchmarks/DATE-prefix.json

Four mock instances (prefix_instances.py) with caches that together hold little more than the running conversations
need. Every router gets the same trace, with empty caches, in turns within one run. Hit rate: prompt tokens that were
cached, of all.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.prefix_instances import BLOCK_TOKENS
from benchmarks.prefix_oracle import Session, best_possible, make_trace, pooled
from vllm_fleet.bench.machine import facts
from vllm_fleet.net.sockets import free_port

INSTANCES = 4
_READY_S = 60.0
_BALANCED = ("--balance-abs-threshold", "4", "--balance-rel-threshold", "1.2")


@dataclass
class Outcome:
    """What one router did with the trace."""

    order: list[tuple[str, str]] = field(default_factory=list)
    """Prompts as they were sent, with their answers."""
    seconds: list[float] = field(default_factory=list)
    failed: int = 0


def contenders(ports: list[int], folder: str, only: list[str]) -> dict[str, tuple[list[str], int]]:
    """Name -> command and port of each router."""
    port = free_port("127.0.0.1")
    urls = [f"http://127.0.0.1:{one}" for one in ports]
    plain = [sys.executable, "-m", "benchmarks.prefix_router", "--port", str(port), "--ports", *map(str, ports)]

    def ours(policy: str, **more: Any) -> list[str]:
        return [*plain, "--policy", json.dumps({"prefill": policy, "decode": policy, **more})]

    theirs = [str(Path(sys.executable).parent / "vllm-router"), "--host", "127.0.0.1", "--port", str(port)]
    theirs += ["--worker-urls", *urls, "--prometheus-port", str(free_port("127.0.0.1")), "--log-level", "error"]
    found = {
        "prefix, events": ours("prefix", kv_events=f"{folder}/{{name}}"),
        "prefix, prompts": ours("prefix"),
        "session": ours("session"),
        "least_load": ours("least_load"),
        "vllm-router cache_aware": [*theirs, "--policy", "cache_aware"],
        # Its default balances from 64 requests of difference on, which four instances like these never see.
        "vllm-router cache_aware, balanced": [*theirs, "--policy", "cache_aware", *_BALANCED],
        "vllm-router consistent_hash": [*theirs, "--policy", "consistent_hash"],
    }
    return {name: (command, port) for name, command in found.items() if not only or name in only}


@contextlib.contextmanager
def process(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A child that ends with the block."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@contextlib.asynccontextmanager
async def up(command: list[str], url: str, http: aiohttp.ClientSession) -> AsyncIterator[None]:
    """A server that answers ``url``."""
    with process(command) as child:
        end = time.monotonic() + _READY_S
        while True:
            assert child.poll() is None, f"ended with {child.returncode}: {' '.join(command)}"
            assert time.monotonic() < end, f"not ready within {_READY_S} s: {' '.join(command)}"
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with http.get(url, timeout=aiohttp.ClientTimeout(total=1)) as answer:
                    if answer.status == 200:
                        break
            await asyncio.sleep(0.1)
        await asyncio.sleep(2.0)  # health is one thing, knowing the instances another
        yield


async def converse(session: Session, number: int, url: str, http: aiohttp.ClientSession, outcome: Outcome) -> None:
    """One user."""
    await asyncio.sleep(session.at_s)
    text = session.system
    for turn in session.turns:
        text += turn.text
        body = {"model": "mock", "prompt": text, "max_tokens": turn.answer_tokens}
        began = time.monotonic()
        entry = len(outcome.order)
        outcome.order.append((text, ""))
        async with http.post(f"{url}/v1/completions", json=body, headers={"x-session-id": f"s{number}"}) as answer:
            if answer.status != 200:
                outcome.failed += 1
                return
            said = (await answer.json())["choices"][0]["text"]
        outcome.seconds.append(time.monotonic() - began)
        outcome.order[entry] = (text, said)
        text += said
        await asyncio.sleep(turn.pause_s)


async def run_one(
    name: str, command: list[str], port: int, ports: list[int], trace: list[Session], http: aiohttp.ClientSession
) -> tuple[dict[str, Any], Outcome]:
    """The trace through one router, beginning with empty caches."""
    for one in ports:
        async with http.post(f"http://127.0.0.1:{one}/reset"):
            pass
    outcome = Outcome()
    url = f"http://127.0.0.1:{port}"
    async with up(command, f"{url}/health", http):
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number, session in enumerate(trace):
                group.create_task(converse(session, number, url, http, outcome))
        took = time.monotonic() - began
    told = []
    for one in ports:
        async with http.post(f"http://127.0.0.1:{one}/reset") as answer:
            told.append(await answer.json())
    prompts = sum(one["prompt_tokens"] for one in told)
    computed = [one["prompt_tokens"] - one["cached_tokens"] for one in told]
    times = sorted(outcome.seconds)
    result = {
        "router": name,
        "hit_rate": round(1 - sum(computed) / prompts, 4),
        "computed_max_to_mean": round(max(computed) * len(computed) / sum(computed), 3),
        "running_max": max(one["running_max"] for one in told),
        "request_p50_s": round(statistics.median(times), 3),
        "request_p99_s": round(times[int(len(times) * 0.99)], 3),
        "requests": len(times),
        "failed": outcome.failed,
        "took_s": round(took, 1),
    }
    return result, outcome


async def run(given: argparse.Namespace) -> dict[str, Any]:
    """All routers, in turns."""
    trace = make_trace(given.sessions, given.apps, given.rate, given.seed)
    ports = [free_port("127.0.0.1") for _ in range(INSTANCES)]
    rows: list[dict[str, Any]] = []
    async with contextlib.AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-"))
        connector = aiohttp.TCPConnector(limit=0)
        http = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        mocks = [sys.executable, "-m", "benchmarks.prefix_instances", "--ports", *map(str, ports)]
        mocks += ["--folder", f"{folder}/{{name}}", "--blocks", str(given.blocks)]
        mocks += ["--prefill-s", str(given.prefill_s), "--decode-s", str(given.decode_s)]
        await stack.enter_async_context(up(mocks, f"http://127.0.0.1:{ports[-1]}/health", http))
        for turn in range(given.rounds):
            for name, (command, port) in contenders(ports, folder, given.only).items():
                row, outcome = await run_one(name, command, port, ports, trace, http)
                best = best_possible(outcome.order, given.blocks * INSTANCES)
                row |= {"round": turn, "best_possible": round(best, 4), "of_best": round(row["hit_rate"] / best, 4)}
                row["one_large_cache"] = round(pooled(outcome.order, given.blocks * INSTANCES), 4)
                rows.append(row)
                print(json.dumps(row), flush=True)
    settings = {key: value for key, value in vars(given).items() if key not in ("out", "only")}
    typed = "python -m benchmarks.prefix_trace " + " ".join(sys.argv[1:])
    cache_tokens = given.blocks * BLOCK_TOKENS
    return {"command": typed.strip(), "machine": facts(), **settings, "cache_tokens": cache_tokens, "rows": rows}


def main() -> None:
    """Run it, print a line for each router and round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=160)
    parser.add_argument("--apps", type=int, default=12)
    parser.add_argument("--rate", type=float, default=8.0, help="new conversations a second")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=2000, help="of each instance's cache")
    parser.add_argument("--prefill-s", type=float, default=50e-6, help="for each token that is not cached")
    parser.add_argument("--decode-s", type=float, default=5e-3, help="for each token of an answer")
    parser.add_argument("--only", action="append", default=[], help="name of a router; repeat for several")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found = asyncio.run(run(given))
    if given.out is not None:
        given.out.write_text(json.dumps(found, default=str) + "\n")


if __name__ == "__main__":
    main()
