"""Time to first token through a fleet with streamed handoffs, beside one plain instance; on CPU cores of their own.

    make bench-streamed

Prefill and the plain instance compute on the first core, one at a time, decode on the second, with everything else (the
client, the router, the controller). Every prompt is new; rounds of the three ways (plain, fleet streamed, fleet
sequential) are interleaved. Prefill and the plain instance compute in the same chunks.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from rich.console import Console
from rich.table import Table

from vllm_fleet.bench.machine import facts
from vllm_fleet.bench.plain import CPU_ENV, plain_instance
from vllm_fleet.bench.recall import make_prompt, prompt_tokens

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "recall" / "fleet-recall"
FACTS = 200
WAYS = ("plain", "streamed", "sequential")


@contextlib.contextmanager
def fleet(home: Path, mode: str, chunk: int) -> Iterator[tuple[str, dict[str, int]]]:
    """A 1P1D fleet: its router, and the pids of its instances."""
    config = home / "fleet.yaml"
    config.write_text(
        f"name: {mode}\nvllm_args: [--max-num-batched-tokens={chunk}]\nrouter: {{port: 0, handoff: {mode}}}\n"
        "handoff: {load: always}\n"
    )
    command = [str(Path(sys.executable).parent / "vllm-fleet")]
    env = {**os.environ, "VLLM_FLEET_HOME": str(home)}
    flags = ["up", "--detach", "--config", str(config), "--model", str(MODEL)]
    subprocess.run([*command, *flags], env=env, check=True, stdout=subprocess.DEVNULL)
    try:
        shown = subprocess.run([*command, "status", "--json", "--name", mode], env=env, check=True, capture_output=True)
        status = json.loads(shown.stdout)
        yield status["router"]["url"], {each["name"]: each["pid"] for each in status["instances"]}
    finally:
        subprocess.run([*command, "down", "--name", mode], env=env, check=True, stdout=subprocess.DEVNULL)


def pin(pid: int, core: int) -> None:
    """Keep a process, its children and all their threads on one core."""
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        for thread in process.threads():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(thread.id, {core})


def first_token_s(url: str, prompt: str) -> tuple[float, str]:
    """Seconds until the first token of a streamed answer, and what x-fleet-handoff said."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=120)
    body = {"model": MODEL.name, "prompt": prompt, "max_tokens": 2, "temperature": 0, "stream": True}
    began = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    line = answer.readline()
    took = time.perf_counter() - began
    if answer.status != 200 or not line.startswith(b"data: {"):
        raise RuntimeError(f"{url} answered {answer.status} {line[:200]!r}")
    answer.read()
    connection.close()
    return took, answer.headers.get("x-fleet-handoff", "")


def measure(urls: dict[str, str], lengths: list[int], rounds: int) -> dict[str, dict[int, list[float]]]:
    """Seconds of each round, by way and prompt length; the first round warms up and does not count."""
    rng = random.Random(time.time_ns())
    found: dict[str, dict[int, list[float]]] = {way: {length: [] for length in lengths} for way in urls}
    for number in range(rounds + 1):
        for length in lengths:
            for way in rng.sample(sorted(urls), len(urls)):
                prompt = " " * (length - prompt_tokens(FACTS)) + make_prompt(rng, FACTS).text
                seconds, handoff = first_token_s(urls[way], prompt)
                if way != "plain" and handoff != "handed_off":
                    raise RuntimeError(f"{way}: {handoff}")
                if number:
                    found[way][length].append(seconds)
    return found


def show(found: dict[str, dict[int, list[float]]]) -> None:
    table = Table(title="time to first token, ms (median); share of the plain instance's")
    for title in ("tokens", *WAYS):
        table.add_column(title, justify="right")
    for length, plain in found["plain"].items():
        cells = [f"{1000 * statistics.median(plain):.0f}"]
        for way in WAYS[1:]:
            ratios = [a / b for a, b in zip(found[way][length], plain, strict=True)]
            cells.append(f"{1000 * statistics.median(found[way][length]):.0f} ({statistics.median(ratios):.3f})")
        table.add_row(str(length), *cells)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", default="2048,4096", help="prompt lengths")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of one chunk of prefill")
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    asked = parser.parse_args()
    lengths = [int(each) for each in asked.tokens.split(",")]
    os.sched_setaffinity(0, {1})
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        urls: dict[str, str] = {}
        arguments = [f"--max-num-batched-tokens={asked.chunk}"]
        urls["plain"] = stack.enter_context(plain_instance(MODEL, home / "plain.log", arguments, CPU_ENV))
        plain = psutil.Process().children()[0].pid
        for way in WAYS[1:]:
            (home / way).mkdir()
            urls[way], pids = stack.enter_context(fleet(home / way, way, asked.chunk))
            pin(pids["prefill-0"], 0)
            pin(pids["decode-0"], 1)
        pin(plain, 0)
        found = measure(urls, lengths, asked.rounds)
    if asked.out is not None:
        report = {"machine": facts(), "chunk": asked.chunk, "rounds": asked.rounds, "seconds": found}
        asked.out.write_text(json.dumps(report, indent=1) + "\n")
    show(found)


if __name__ == "__main__":
    main()
