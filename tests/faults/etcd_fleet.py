"""Real controllers on a real etcd, and members played by threads. Every process has a port and a folder of its own."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from vllm_fleet.config.connector import bearer
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import BadRequest, FleetError
from vllm_fleet.net.control_client import ControlClient
from vllm_fleet.net.sockets import free_port
from vllm_fleet.wire.control import Heartbeat, Register, Registered, Snapshot

TOKEN = bytes(range(32))
BEARER = bearer(TOKEN)
BEAT_S = 0.2


def eventually(what: str, true: Callable[[], bool], within_s: float = 15.0) -> float:
    """Wait until ``true``; how long it took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < within_s, f"not within {within_s} s: {what}"
        time.sleep(0.02)
    return time.monotonic() - began


class Controllers:
    """Controllers of one fleet by name; each answers at a port that it keeps over its lives."""

    def __init__(self, folder: Path, etcd: dict[str, Any], names: str = "abc", **rules: float) -> None:
        self._folder, self._rules = folder, rules
        (folder / "token").write_text(TOKEN.hex())
        (folder / "token").chmod(0o600)
        self._ports = {name: free_port("127.0.0.1") for name in names}
        self.urls = {name: f"http://127.0.0.1:{port}" for name, port in self._ports.items()}
        self.etcd = {name: {"lease_s": 3, **etcd} for name in names}
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, *names: str) -> None:
        """Start them, and return when they answer."""
        for name in names:
            self.launch(name)
        for name in names:
            eventually(f"{name} answers", lambda name=name: self._is_up(name))  # type: ignore[misc]

    def _is_up(self, name: str) -> bool:
        assert self._running[name].poll() is None, f"{name} has ended: {self.log(name)}"
        return self.health(name) is not None

    def launch(self, name: str) -> subprocess.Popen[bytes]:
        settings = {"fleet": "test", "token_file": str(self._folder / "token"), "port": self._ports[name]}
        file = self._folder / f"{name}.json"
        file.write_text(json.dumps({**settings, **self._rules, "etcd": self.etcd[name]}))
        argv = [sys.executable, "-m", "vllm_fleet.controller", "--settings", str(file)]
        with (self._folder / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(argv, stdout=log, stderr=log)
        return self._running[name]

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send it, and wait until the kernel shows that it happened."""
        process = self._running[name]
        os.kill(process.pid, number)
        if number is signal.SIGKILL:
            process.wait(10)
        elif number is signal.SIGSTOP:
            eventually("it is stopped", lambda: self.stat(name) == "T")
        elif number is signal.SIGCONT:
            eventually("it goes on", lambda: self.stat(name) != "T")

    def stop(self, name: str) -> int:
        """Its exit status, after a SIGTERM."""
        return self._running.pop(name).wait(10)

    def stat(self, name: str) -> str:
        return Path(f"/proc/{self._running[name].pid}/stat").read_text().rpartition(")")[2].split()[0]

    def cmdline(self, name: str) -> str:
        pid = self._running[name].pid
        return Path(f"/proc/{pid}/cmdline").read_text() + Path(f"/proc/{pid}/environ").read_text()

    def log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text()

    def health(self, name: str) -> dict[str, Any] | None:
        """What it says of itself; None when it does not answer."""
        try:
            with urllib.request.urlopen(f"{self.urls[name]}/health", timeout=0.5) as answer:
                found: dict[str, Any] = json.loads(answer.read())
                return found
        except (urllib.error.URLError, OSError):
            return None

    def leader(self, *among: str) -> str | None:
        """Who answers as the leader; never two at once."""
        leading = []
        for name in among or self.urls:
            if self._running.get(name) is not None and self.stat(name) not in "TZ":
                health = self.health(name)
                if (
                    health is not None
                    and health["status"] != "standby"
                    and self.client(name).try_snapshot() is not None
                ):
                    leading.append(name)
        assert len(leading) <= 1, f"{leading} lead at once"
        return leading[0] if leading else None

    def await_leader(self, *among: str) -> str:
        eventually("somebody leads", lambda: self.leader(*among) is not None)
        found = self.leader(*among)
        assert found is not None
        return found

    def client(self, *names: str) -> Client:
        return Client([self.urls[name] for name in names or self.urls])

    def close(self) -> None:
        for process in self._running.values():
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
            process.wait(10)


class Client(ControlClient):
    """A client of some of the controllers."""

    def __init__(self, urls: list[str]) -> None:
        super().__init__(urls, BEARER)

    def try_snapshot(self, within_s: float = 1.0) -> Snapshot | None:
        try:
            return self.snapshot(Deadline.after(within_s, "test"))
        except FleetError:
            return None

    def join(self, name: str, life: str, within_s: float = 2.0) -> Registered:
        url = f"http://{name}:1"
        return self.register(Register(name, "both", url, 1, life, "ready"), Deadline.after(within_s, "test"))


class Members:
    """Instances that register once and send heartbeats until ``close``; and what they were told."""

    def __init__(self, client: Client, count: int) -> None:
        self.answers: list[tuple[int, str, str]] = []
        """Generation, name and life of every registration that was answered."""
        self.beats, self.fenced = 0, 0
        self._closing = threading.Event()
        self._threads = [threading.Thread(target=self._live, args=(client, f"m{n}")) for n in range(count)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._closing.set()
        for thread in self._threads:
            thread.join(10)

    def _live(self, client: Client, name: str) -> None:
        life, generation = secrets.token_hex(8), 0
        while not self._closing.is_set():
            try:
                if generation == 0:
                    generation = client.join(name, life).generation
                    self.answers.append((generation, name, life))
                else:
                    client.heartbeat(name, Heartbeat(generation, "ready"), Deadline.after(2.0, "test"))
                    self.beats += 1
            except BadRequest:
                self.fenced += 1
                generation = 0
            except FleetError:
                pass
            self._closing.wait(BEAT_S)


class HoldingProxy:
    """Passes bytes on to an etcd; once armed, it holds the next transaction back until it is released."""

    def __init__(self, port: int) -> None:
        self.held, self.answered = threading.Event(), threading.Event()
        self.answer = b""
        self._armed, self._release, self._target = threading.Event(), threading.Event(), port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads: list[threading.Thread] = []
        self._open: list[socket.socket] = []
        self._run(self._accept)

    def arm(self) -> None:
        self._armed.set()

    def release(self) -> None:
        self._release.set()

    def close(self) -> None:
        self._release.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in self._open:
            with closing(each), suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)

    def _run(self, work: Callable[..., None], *arguments: object) -> None:
        self._threads.append(threading.Thread(target=work, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        while True:
            try:
                theirs, _ = self._listener.accept()
                ours = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            self._open += [theirs, ours]
            holding = threading.Event()
            self._run(self._up, theirs, ours, holding)
            self._run(self._down, ours, theirs, holding)

    def _up(self, source: socket.socket, sink: socket.socket, holding: threading.Event) -> None:
        try:
            while chunk := source.recv(1 << 20):
                if b"/kv/txn" in chunk and self._armed.is_set() and not self.held.is_set():
                    while not _complete(chunk):  # all of it, so that its sender can do no more about it
                        chunk += source.recv(1 << 20)
                    holding.set()
                    self.held.set()
                    self._release.wait()
                sink.sendall(chunk)
        except OSError:
            pass

    def _down(self, source: socket.socket, sink: socket.socket, holding: threading.Event) -> None:
        try:
            while chunk := source.recv(1 << 20):
                sink.sendall(chunk)
                if holding.is_set() and not self.answered.is_set():
                    self.answer += chunk
                    if b"}\n" in chunk or chunk.endswith(b"}"):
                        self.answered.set()
        except OSError:
            pass


def _complete(request: bytes) -> bool:
    head, separator, body = request.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    return bool(separator) and length is not None and len(body) >= int(length[1])
