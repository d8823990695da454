"""Handoffs between two CUDA vLLM instances, one GPU each: our connector beside vLLM's NixlConnector, interleaved.

    python -m benchmarks.gpu_handoff --model DIR --json figures.json

Two pairs of instances share the two GPUs: one pair with each connector. A round hands a prompt over with each: prefill
answers; decode gets the request with prefill's kv_transfer_params (remote), then once more with its KV in decode's own
prefix cache (local). remote - local is what the handoff costs; bytes and seconds of the copy are each connector's own
counters (vllm:fleet_handoff_*, vllm:nixl_*). The answer of decode must be prefill's own, token for token.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import secrets
import statistics
import tempfile
import time
import urllib.error
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_fleet.bench.machine import facts
from vllm_fleet.bench.plain import plain_instance, post, scrape, total
from vllm_fleet.net import sockets

HOLD = {"do_remote_decode": True, "do_remote_prefill": False}
TOKENS = (1024, 4096, 8192, 16384, 32768)
VOCABULARY = 100_000
ENV = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}
COUNTERS = {
    "fleet": ("vllm:fleet_handoff_bytes_total", "vllm:fleet_handoff_copy_seconds_sum"),
    "nixl": ("vllm:nixl_bytes_transferred_sum", "vllm:nixl_xfer_time_seconds_sum"),
}


@dataclass
class Pair:
    """One prefill and one decode instance with the same connector."""

    name: str
    model: str
    counters: tuple[str, str]
    prefill: str
    decode: str
    rows: dict[int, list[dict[str, float]]] = field(default_factory=dict)
    different: int = 0
    failed: list[str] = field(default_factory=list)

    def round(self, tokens: int, seed: int, *, kept: bool) -> None:
        """Hand one prompt over; its figures are kept or not (the first one makes the link)."""
        rng = random.Random(seed)
        prompt = [rng.randrange(VOCABULARY) for _ in range(tokens)]
        body: dict[str, Any] = {"model": self.model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
        try:
            held, _ = post(f"{self.prefill}/v1/completions", {**body, "kv_transfer_params": HOLD})
            before = self._counted()
            began = time.perf_counter()
            request = {**body, "kv_transfer_params": held["kv_transfer_params"]}
            remote, _ = post(f"{self.decode}/v1/completions", request)
            remote_s = time.perf_counter() - began
        except urllib.error.HTTPError as error:
            self.failed.append(error.read().decode(errors="replace")[:300])
            return
        time.sleep(0.05)
        began = time.perf_counter()
        post(f"{self.decode}/v1/completions", body)
        local_s = time.perf_counter() - began
        nbytes, copy_s = (b - a for a, b in zip(before, self._counted(), strict=True))
        self.different += remote["choices"][0]["text"] != held["choices"][0]["text"]
        if kept:
            row = {"remote_s": remote_s, "local_s": local_s, "nbytes": nbytes, "copy_s": copy_s}
            self.rows.setdefault(tokens, []).append(row)

    def _counted(self) -> tuple[float, float]:
        time.sleep(0.3)  # counters reach /metrics with a later engine step
        metrics = scrape(self.decode)
        return total(metrics, self.counters[0]), total(metrics, self.counters[1])

    def summary(self, tokens: int) -> dict[str, Any] | None:
        """Medians of one length; None when nothing was measured."""
        rows = self.rows.get(tokens, [])
        if not rows:
            return None
        moved = [row for row in rows if row["nbytes"] and row["copy_s"]]
        return {
            "connector": self.name,
            "tokens": tokens,
            "rounds": len(rows),
            "mib": statistics.median(row["nbytes"] for row in rows) / 2**20,
            "copy_gb_s": statistics.median(row["nbytes"] / row["copy_s"] for row in moved) / 1e9 if moved else 0.0,
            "copy_ms": 1e3 * statistics.median(row["copy_s"] for row in rows),
            "remote_ms": 1e3 * statistics.median(row["remote_s"] for row in rows),
            "local_ms": 1e3 * statistics.median(row["local_s"] for row in rows),
            "handoff_ms": 1e3 * statistics.median(row["remote_s"] - row["local_s"] for row in rows),
            "raw": rows,
        }


def configs(folder: Path, transports: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """kv_transfer_config of prefill and decode, for each connector."""
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    ours = [
        {
            "kv_connector": "FleetConnector",
            "kv_connector_module_path": "vllm_fleet.connector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "fleet": "bench",
                "name": role,
                "role": role,
                "token_file": str(token),
                "transports": list(transports),
            },
        }
        for role in ("prefill", "decode")
    ]
    return {"fleet": ours, "nixl": [{"kv_connector": "NixlConnector", "kv_role": "kv_both"}] * 2}


@contextlib.contextmanager
def pairs(folder: Path, model: Path, transports: Sequence[str], wanted: Sequence[str]) -> Iterator[dict[str, Pair]]:
    """Start two instances for each connector, all at once, one GPU for prefill and one for decode."""
    args = ["--load-format", "dummy", "--max-model-len", "33000", "--gpu-memory-utilization", "0.3"]
    # Given outright: instances that start at once on one GPU would each take the others' memory for their own.
    args += ["--kv-cache-memory-bytes", str(16 << 30), "--max-num-batched-tokens", "8192"]
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as threads:
        starting = {}
        for name in wanted:
            for gpu, config in enumerate(configs(folder, transports)[name]):
                env = {**ENV, "CUDA_VISIBLE_DEVICES": str(gpu)}
                env["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(sockets.free_port("127.0.0.1"))
                instance = plain_instance(
                    model,
                    folder / f"{name}-{gpu}.log",
                    [*args, "--kv-transfer-config", json.dumps(config)],
                    env,
                    start_s=240,
                )
                starting[name, gpu] = threads.submit(stack.enter_context, instance)
        urls = {key: future.result() for key, future in starting.items()}
        yield {name: Pair(name, model.name, COUNTERS[name], urls[name, 0], urls[name, 1]) for name in wanted}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", type=Path, required=True, help="folder with config and tokenizer; weights are random"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--transports", default="cuda_ipc,tcp")
    parser.add_argument("--connectors", default="fleet,nixl")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    parser.add_argument("--logs", type=Path, default=None, help="keep the instances' logs in this folder")
    args = parser.parse_args()
    machine, lengths = facts(), [int(tokens) for tokens in args.tokens.split(",")]
    folder = args.logs or Path(tempfile.mkdtemp(prefix="fleet-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    with pairs(folder, args.model, args.transports.split(","), args.connectors.split(",")) as made:
        for pair in made.values():
            pair.round(2048, 1, kept=False)
            pair.round(2048, 2, kept=False)
        for tokens in lengths:
            for number in range(args.rounds):
                for pair in made.values():
                    pair.round(tokens, 1000 * tokens + number, kept=True)
    rows = [row for tokens in lengths for pair in made.values() if (row := pair.summary(tokens))]
    faults = {p.name: {"different_answers": p.different, "failed": p.failed} for p in made.values()}
    if args.json:
        report = {"command": "python -m benchmarks.gpu_handoff", "machine": machine, "rows": rows, "faults": faults}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    table = Table(title="Handoff between two GPUs, medians", padding=(0, 1, 0, 0))
    for heading in ("tokens", "connector", "MiB", "copy GB/s", "copy ms", "remote ms", "local ms", "handoff ms"):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [f"{row[key]:.1f}" for key in ("mib", "copy_gb_s", "copy_ms", "remote_ms", "local_ms", "handoff_ms")]
        table.add_row(str(row["tokens"]), row["connector"], *cells)
    console = Console(width=100)
    console.print(table)
    console.print(json.dumps(faults), markup=False)


if __name__ == "__main__":
    main()
