"""How long a handoff takes between two idle instances: ours beside vLLM's NixlConnector, in one run.

    make bench-handoff

For each prompt of 1,025 tokens (eight full blocks of 128 and one token): prefill answers; decode gets the request with
prefill's kv_transfer_params and answers one token (remote); the same request again, its KV now in decode's own prefix
cache (local). Both compute exactly one token, so remote - local is what the handoff costs. Rounds of both connectors
are interleaved, after rounds of ours with nothing else on the machine. NixlConnector stalls for tens of seconds on CPU,
so it gets fewer rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_fleet.bench.machine import facts
from vllm_fleet.bench.plain import CPU_ENV, plain_instance, post, scrape, total
from vllm_fleet.bench.recall import make_prompt
from vllm_fleet.net import sockets

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "recall" / "fleet-recall"
FACTS = 170
HOLD = {"do_remote_decode": True, "do_remote_prefill": False}


@dataclass
class Pair:
    """One prefill and one decode instance, and what was measured between them; seconds."""

    prefill: str
    decode: str
    remote_s: list[float] = field(default_factory=list)
    local_s: list[float] = field(default_factory=list)
    wrong: int = 0
    failed_after_s: list[float] = field(default_factory=list)

    def round(self, seed: int) -> None:
        """One handoff and its local twin."""
        prompt = make_prompt(random.Random(seed), FACTS)
        body: dict[str, Any] = {"model": MODEL.name, "prompt": f" {prompt.text}", "max_tokens": 1, "temperature": 0}
        held, _ = post(f"{self.prefill}/v1/completions", {**body, "kv_transfer_params": HOLD})
        began = time.perf_counter()
        request = {**body, "kv_transfer_params": held["kv_transfer_params"]}
        try:
            remote, _ = post(f"{self.decode}/v1/completions", request, timeout_s=180)
        except urllib.error.HTTPError:  # NixlConnector answers 500 when its load fails
            self.failed_after_s.append(time.perf_counter() - began)
            return
        self.remote_s.append(time.perf_counter() - began)
        time.sleep(0.05)
        began = time.perf_counter()
        local, _ = post(f"{self.decode}/v1/completions", body)
        self.local_s.append(time.perf_counter() - began)
        texts = {remote["choices"][0]["text"], local["choices"][0]["text"]}
        self.wrong += texts != {prompt.value[0]}
        time.sleep(0.05)

    def row(self) -> dict[str, float]:
        """Milliseconds."""
        extra = [1e3 * (r - b) for r, b in zip(self.remote_s, self.local_s, strict=True)]
        remote = sorted(1e3 * s for s in self.remote_s)
        return {
            "rounds": len(extra),
            "decode_remote_ms_median": statistics.median(remote),
            "decode_remote_ms_max": remote[-1],
            "decode_local_ms_median": 1e3 * statistics.median(self.local_s),
            "handoff_ms_median": statistics.median(extra),
            "handoff_ms_max": max(extra),
            "wrong_answers": self.wrong,
            "failed": len(self.failed_after_s),
            "failed_after_ms_max": 1e3 * max(self.failed_after_s, default=0.0),
        }


@contextlib.contextmanager
def our_pair(folder: str) -> Iterator[Pair]:
    """A fleet of one prefill and one decode instance."""
    env = {**os.environ, "VLLM_FLEET_HOME": folder}
    command = str(Path(sys.executable).parent / "vllm-fleet")
    subprocess.run([command, "up", "--detach", "--model", str(MODEL), "--router-port", "0"], env=env, check=True)
    try:
        status = json.loads(subprocess.check_output([command, "status", "--json"], env=env))
        urls = {instance["role"]: instance["url"] for instance in status["instances"]}
        yield Pair(urls["prefill"], urls["decode"])
    finally:
        subprocess.run([command, "down"], env=env, check=True)


@contextlib.contextmanager
def nixl_pair(folder: str) -> Iterator[Pair]:
    """Two vLLM servers with vLLM's own NixlConnector over CPU memory."""
    config = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
    args = ["--kv-transfer-config", json.dumps(config)]
    with contextlib.ExitStack() as stack:
        urls = []
        for name in ("prefill", "decode"):
            env = {**CPU_ENV, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(sockets.free_port("127.0.0.1"))}
            urls.append(stack.enter_context(plain_instance(MODEL, Path(folder) / f"nixl-{name}.log", args, env)))
        yield Pair(prefill=urls[0], decode=urls[1])


def side_by_side(ours: Pair, nixl: Pair, rounds: int, nixl_rounds: int) -> dict[str, dict[str, float]]:
    """Interleaved rounds; each NixlConnector round is followed by several of ours."""
    every = max(1, rounds // nixl_rounds)
    for seed in range(rounds):
        ours.round(seed)
        if seed % every == 0 and seed // every < nixl_rounds:
            nixl.round(seed)
    return {"vllm-fleet": ours.row(), "NixlConnector": nixl.row()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--nixl-rounds", type=int, default=5, help="0 leaves NixlConnector out")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    args = parser.parse_args()
    machine = facts()
    with tempfile.TemporaryDirectory(prefix="fleet-bench-") as folder, contextlib.ExitStack() as stack:
        ours = stack.enter_context(our_pair(folder))
        for seed in range(3):
            Pair(ours.prefill, ours.decode).round(20_000 + seed)  # the first one makes the link
        alone = Pair(ours.prefill, ours.decode)
        for seed in range(args.rounds):
            alone.round(10_000 + seed)
        metrics = scrape(ours.decode)
        rows = {"vllm-fleet, alone": alone.row()}
        if args.nixl_rounds:
            rows |= side_by_side(ours, stack.enter_context(nixl_pair(folder)), args.rounds, args.nixl_rounds)
    loads = total(metrics, "vllm:fleet_handoff_load_seconds_count")
    nbytes = total(metrics, "vllm:fleet_handoff_bytes_total")
    copy_s = total(metrics, "vllm:fleet_handoff_copy_seconds_sum")
    own = {
        "loads": loads,
        "bytes_per_load": nbytes / loads,
        "load_ms_mean": 1e3 * total(metrics, "vllm:fleet_handoff_load_seconds_sum") / loads,
        "copy_ms_mean": 1e3 * copy_s / loads,
        "copy_gb_per_s": nbytes / copy_s / 1e9,
    }
    table = Table(title="Handoff of 1,025 tokens between two idle instances, milliseconds")
    for heading in (
        "connector",
        "rounds",
        "decode, KV remote",
        "decode, KV local",
        "handoff (median)",
        "worst",
        "wrong",
        "failed",
    ):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        remote, local = row["decode_remote_ms_median"], row["decode_local_ms_median"]
        cells = [f"{value:.1f}" for value in (remote, local, row["handoff_ms_median"], row["handoff_ms_max"])]
        table.add_row(name, str(row["rounds"]), *cells, str(row["wrong_answers"]), str(row["failed"]))
    Console().print(table)
    Console().print(
        f"vllm-fleet's own counters, alone: {own['loads']:.0f} loads of {own['bytes_per_load'] / 2**20:.2f} MiB, "
        f"{own['load_ms_mean']:.2f} ms each (mean), {own['copy_ms_mean']:.2f} ms of it copying at "
        f"{own['copy_gb_per_s']:.1f} GB/s"
    )
    if args.json:
        report = {"command": "make bench-handoff", "machine": machine, "rows": rows, "own_counters": own}
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    if any(row["wrong_answers"] or (row["failed"] and "fleet" in name) for name, row in rows.items()):
        raise SystemExit("wrong or failed answers")


if __name__ == "__main__":
    main()
