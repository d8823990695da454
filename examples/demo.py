"""The demo: a fleet of two real vLLM instances, one question, and the proof that KV moved between them.

    make demo

Exits 0 only if the fleet's answer is right, equals one plain instance's, and decode's KV came from prefill.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_fleet.bench.plain import plain_instance, post, scrape, total
from vllm_fleet.bench.recall import RecallPrompt, make_prompt

MODEL = Path(__file__).parent / "recall" / "fleet-recall"
FLEET = [str(Path(sys.executable).parent / "vllm-fleet")]
FACTS = 170  # 1,024 tokens: eight blocks of 128
ANSWER_TOKENS = 15

console = Console(soft_wrap=True)


def fleet(*words: str, env: dict[str, str], quiet: bool = False) -> str:
    """Run a vllm-fleet command as a user would; its output."""
    run = subprocess.run([*FLEET, *words], env=env, text=True, stdout=subprocess.PIPE if quiet else None, check=False)
    if run.returncode:
        raise SystemExit(f"`vllm-fleet {' '.join(words)}` failed with exit code {run.returncode}")
    return run.stdout or ""


def ask(url: str, prompt: RecallPrompt) -> tuple[str, dict[str, str]]:
    """The answer's text and its headers."""
    body = {"model": MODEL.name, "prompt": prompt.text, "max_tokens": ANSWER_TOKENS, "temperature": 0}
    answer, headers = post(f"{url}/v1/completions", body)
    return answer["choices"][0]["text"], headers


def loaded(url: str) -> tuple[float, float, float]:
    """Decode's own counters: handoffs loaded, bytes, seconds of copying."""
    metrics = scrape(url)
    return (
        total(metrics, "vllm:fleet_handoffs_total", outcome="loaded"),
        total(metrics, "vllm:fleet_handoff_bytes_total"),
        total(metrics, "vllm:fleet_handoff_copy_seconds_sum"),
    )


def through_the_fleet(env: dict[str, str], prompt: RecallPrompt) -> str:
    """Start a fleet, ask it, show what happened, stop it; the answer."""
    fleet("up", "--detach", "--model", str(MODEL), "--router-port", "0", env=env)
    try:
        status: dict[str, Any] = json.loads(fleet("status", "--json", env=env, quiet=True))
        urls = {instance["name"]: instance["url"] for instance in status["instances"]}
        ask(status["router"]["url"], make_prompt(random.Random(1), 40))  # the first handoff also makes the link
        decode = next(url for name, url in urls.items() if name.startswith("decode"))
        before = loaded(decode)
        text, headers = ask(status["router"]["url"], prompt)
        deadline = time.monotonic() + 10
        while (after := loaded(decode))[0] == before[0] and time.monotonic() < deadline:
            time.sleep(0.1)
        show(prompt, text, headers, [b - a for a, b in zip(before, after, strict=True)])
        if headers.get("x-fleet-handoff") != "handed_off" or after[1] <= before[1]:
            raise SystemExit("the demo failed: no KV was moved")
    finally:
        fleet("down", env=env)
    return text


def show(prompt: RecallPrompt, text: str, headers: dict[str, str], moved: list[float]) -> None:
    """Print the question, its answer and the handoff."""
    handoffs, nbytes, seconds = moved
    table = Table(title="One question through the fleet", show_header=False, title_justify="left")
    table.add_row("prompt", f"{prompt.text[:38]} … {prompt.text[-22:]}")
    table.add_row("answer", f"{text!r}  ({'right' if text.startswith(prompt.value) else 'WRONG'})")
    table.add_row("prefilled by", headers.get("x-fleet-prefill", "?"))
    table.add_row("decoded by", headers.get("x-fleet-decode", "?"))
    speed = f"{nbytes / seconds / 1e9:.1f} GB/s" if seconds else "?"
    table.add_row("KV moved", f"{nbytes / 2**20:.2f} MiB in {1e3 * seconds:.2f} ms, {speed} ({handoffs:.0f} handoff)")
    console.print(table)


def main() -> None:
    prompt = make_prompt(random.Random(7), FACTS, asked=20)
    with tempfile.TemporaryDirectory(prefix="fleet-demo-") as folder:
        env = {**os.environ, "VLLM_FLEET_HOME": folder}
        text = through_the_fleet(env, prompt)
        console.print("\nThe same prompt to one plain vLLM instance …")
        with plain_instance(MODEL, Path(folder) / "plain.log") as url:
            plain, _ = ask(url, prompt)
    equal = "equal" if plain == text else "DIFFERENT"
    console.print(f"one instance answers {plain!r}: [bold]{equal}[/bold]")
    if plain != text or not text.startswith(prompt.value):
        raise SystemExit("the demo failed: the fleet's answer is not the right one")
    console.print("[green]The demo succeeded.[/green]")


if __name__ == "__main__":
    main()
