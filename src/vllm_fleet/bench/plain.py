"""One plain vLLM instance, without any connector: the reference that a fleet must equal."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_fleet.core.errors import FleetError
from vllm_fleet.net import sockets

START_S = 300.0
CPU_ENV: Mapping[str, str] = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


class PlainError(FleetError):
    """The plain instance did not start."""


@contextlib.contextmanager
def plain_instance(
    model: Path, log: Path, args: Sequence[str] = (), env: Mapping[str, str] = CPU_ENV, *, start_s: float = START_S
) -> Iterator[str]:
    """Start one vLLM server, wait until it answers, yield its base URL, stop it. Served under the model folder's name.

    Raises:
        PlainError: it ended or did not answer in time; the message holds the log's last lines.
    """
    port = sockets.free_port("127.0.0.1")
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1"]
    argv += ["--port", str(port), "--served-model-name", model.name, "--enforce-eager", *args]
    with log.open("w") as output:
        server = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **env},
            start_new_session=True,
        )
    try:
        _wait_until_healthy(server, port, log, start_s)
        yield f"http://127.0.0.1:{port}"
    finally:
        _stop(server)


def post(url: str, body: Mapping[str, Any], timeout_s: float = 120.0) -> tuple[dict[str, Any], dict[str, str]]:
    """POST JSON; the decoded answer and its headers, names in lower case."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout_s) as answer:
        return json.load(answer), {name.lower(): value for name, value in answer.headers.items()}


def scrape(url: str, timeout_s: float = 10.0) -> str:
    """An instance's or router's /metrics."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=timeout_s) as answer:
        text: str = answer.read().decode()
        return text


def total(metrics: str, name: str, **labels: str) -> float:
    """The sum of all samples called ``name`` whose labels include ``labels``."""
    found = 0.0
    for line in metrics.splitlines():
        if line.startswith("#"):
            continue
        series, _, value = line.rpartition(" ")
        if series.partition("{")[0] == name and all(f'{key}="{wanted}"' in series for key, wanted in labels.items()):
            found += float(value)
    return found


def _wait_until_healthy(server: subprocess.Popen[bytes], port: int, log: Path, start_s: float) -> None:
    until = time.monotonic() + start_s
    while time.monotonic() < until:
        if server.poll() is not None:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise PlainError(f"the plain instance ended with code {server.returncode}:\n{tail}")
        health = f"http://127.0.0.1:{port}/health"
        with contextlib.suppress(OSError), urllib.request.urlopen(health, timeout=2.0):
            return
        time.sleep(0.2)
    raise PlainError(f"the plain instance did not answer within {start_s:.0f} s; see {log}")


def _stop(server: subprocess.Popen[bytes]) -> None:
    """Let the server end its engine itself, which gives shared memory back; then make sure of the whole group."""
    server.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(timeout=10.0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait(timeout=10.0)
