"""The processes of benchmarks/gpu_serving.py: controller, router, our pair, NixlConnector's pair, plain instances."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import aiohttp

from benchmarks.serving_device import GIB, Device
from vllm_fleet.config.connector import bearer, read_token
from vllm_fleet.config.load import process_environment
from vllm_fleet.launcher import processes
from vllm_fleet.launcher.child import ChildProcess
from vllm_fleet.launcher.connectors import KV_ROLES
from vllm_fleet.launcher.spec import ProcessSpec
from vllm_fleet.net import sockets

HOST = "127.0.0.1"
FLEET = "bench"
STOP_S = 8.0
PROBE_EVERY_S = 0.3
LOG_LINES = 50
KINDS = ("fleet", "nixl", "plain-0", "plain-1")


@dataclass
class Started:
    """What runs, and why the rest does not."""

    urls: dict[str, str]
    secret: str
    """Bearer token for the router's timelines."""
    failed: dict[str, list[str]] = field(default_factory=dict)
    """Last lines of the log of each process that did not become ready."""
    ready_s: dict[str, float] = field(default_factory=dict)

    def has(self, *names: str) -> bool:
        """Whether all of these answer."""
        return all(name in self.urls for name in names)


class Specs:
    """Which processes to start, with everything they need in one folder."""

    def __init__(self, folder: Path, model: Path, device: Device, *, eager: bool) -> None:
        self._folder, self._model, self._device = folder, model, device
        self._args = ["--enforce-eager"] if eager else list(device.graphs)
        self.token = folder / "token"
        self.token.write_text(secrets.token_hex(32))
        self.token.chmod(0o600)
        self._ports: set[int] = set()
        self._controller = self._url()

    def of(self, kinds: Sequence[str]) -> Iterator[ProcessSpec]:
        """The processes of each of KINDS."""
        for kind in kinds:
            if kind == "fleet":
                yield self._own("controller", self._controller, {"state_dir": str(self._folder / "state")})
                yield self._own("router", self._url(), {"controller": self._controller})
                yield self._instance("prefill", "fleet", 0)
                yield self._instance("decode", "fleet", 1)
            elif kind == "nixl":
                yield self._instance("nixl-prefill", "nixl", 0)
                yield self._instance("nixl-decode", "nixl", 1)
            else:
                yield self._instance(kind, "plain", int(kind[-1]))

    def _url(self) -> str:
        return f"http://{HOST}:{self._port()}"

    def _port(self) -> int:
        port = sockets.free_port(HOST)
        while port in self._ports:
            port = sockets.free_port(HOST)
        self._ports.add(port)
        return port

    def _own(self, kind: Literal["controller", "router"], url: str, further: Mapping[str, str]) -> ProcessSpec:
        settings = {"fleet": FLEET, "token_file": str(self.token), "host": HOST, "port": int(url.rpartition(":")[2])}
        file = self._folder / f"{kind}.json"
        file.write_text(json.dumps(settings | dict(further)))
        argv = (sys.executable, "-m", f"vllm_fleet.{kind}", "--settings", str(file))
        return ProcessSpec(kind, kind, kind, argv, url, {"PYTHONUNBUFFERED": "1"})

    def _instance(self, name: str, kind: Literal["fleet", "nixl", "plain"], gpu: int) -> ProcessSpec:
        url, env = self._url(), dict(self._device.env)
        argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self._model)]
        argv += ["--served-model-name", self._model.name, "--host", HOST, "--port", url.rpartition(":")[2]]
        argv += ["--enable-prompt-tokens-details", *self._device.args, *self._args]
        if self._device.kv_gib[kind]:
            argv += ["--kv-cache-memory-bytes", str(self._device.kv_gib[kind] * GIB)]
        if kind == "fleet":
            argv += ["--kv-transfer-config", json.dumps(self._ours(name, url))]
        elif kind == "nixl":
            config = {"kv_connector": "NixlConnector", "kv_role": "kv_both", **self._device.nixl}
            argv += ["--kv-transfer-config", json.dumps(config)]
            env["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(self._port())
        if self._device.gpus:
            env["CUDA_VISIBLE_DEVICES"] = self._device.gpus[gpu]
        return ProcessSpec(name, "instance", name.rpartition("-")[2] or name, tuple(argv), url, env)

    def _ours(self, role: str, url: str) -> dict[str, Any]:
        return {
            "kv_connector": "FleetConnector",
            "kv_connector_module_path": "vllm_fleet.connector",
            "kv_role": KV_ROLES[role],
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "fleet": FLEET,
                "name": role,
                "role": role,
                "token_file": str(self.token),
                "url": url,
                "controller": self._controller,
                "transports": list(self._device.transports),
            },
        }


@contextlib.asynccontextmanager
async def running(specs: Sequence[ProcessSpec], token: Path, logs: Path, start_s: float) -> AsyncIterator[Started]:
    """Start all at once, wait until each answers or ``start_s`` is over; leaving the block ends them all.

    What has not become ready is ended at once, and the others are used without it.
    """
    children: dict[str, ChildProcess] = {}
    try:
        for spec in specs:
            children[spec.name] = ChildProcess(spec, logs / f"{spec.name}.log", process_environment())
        started = Started({}, bearer(read_token(token)))
        await _wait(children, started, start_s)
        late = {name: child for name, child in children.items() if name not in started.urls}
        for name in late:
            started.failed[name] = (logs / f"{name}.log").read_text(errors="replace").splitlines()[-LOG_LINES:]
        stop(list(late.values()))
        children = {name: child for name, child in children.items() if name not in late}
        yield started
    finally:
        stop(list(children.values()))


async def _wait(children: Mapping[str, ChildProcess], started: Started, start_s: float) -> None:
    began, waiting = time.monotonic(), dict(children)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2.0)) as session:
        while waiting and time.monotonic() < began + start_s:
            for name, child in list(waiting.items()):
                ended = child.poll()
                if not ended and await _answers(session, child.spec):
                    started.urls[name] = child.spec.url
                    started.ready_s[name] = round(time.monotonic() - began, 1)
                if ended or name in started.urls:
                    del waiting[name]
            if not all(name in waiting or started.has(name) for name in ("prefill", "decode")):
                waiting.pop("router", None)  # what it waits for has ended
            await asyncio.sleep(PROBE_EVERY_S)


async def _answers(session: aiohttp.ClientSession, spec: ProcessSpec) -> bool:
    """Whether it is ready; the router is when it can hand prompts over."""
    try:
        async with session.get(spec.health_url) as answer:
            if answer.status != 200:
                return False
            if spec.kind != "router":
                return True
            found = await answer.json()
            return bool(found["prefill"] and found["decode"])
    except (aiohttp.ClientError, OSError):
        return False


def stop(children: Sequence[ChildProcess]) -> None:
    """End these and all they started: politely for STOP_S, then not."""
    rows = processes.table()
    for child in children:
        child.remember(rows)
        child.signal_group(signal.SIGTERM)
    until = time.monotonic() + STOP_S
    while time.monotonic() < until and not all(child.poll() for child in children):
        time.sleep(0.05)
    for child in children:
        child.signal_group(signal.SIGKILL)
    for child in children:
        while not child.poll():  # SIGKILL was sent: it ends
            time.sleep(0.01)
        child.bury()
