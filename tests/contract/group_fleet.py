"""A controller and workers of groups, each a process of its own."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from vllm_fleet.config.connector import bearer
from vllm_fleet.net import sockets

ROOT = Path(__file__).parents[2]
TOKEN = bytes(range(32))
NOTHING_S = 150.0
"""A process that says nothing for so long fails the test."""


class Said:
    """What a process says, line by line."""

    def __init__(self, process: subprocess.Popen[str], stream: Any) -> None:
        self.lines: queue.Queue[str] = queue.Queue()
        self._process = process
        threading.Thread(target=self._read, args=(stream,), daemon=True).start()

    def next(self) -> str:
        line = self.lines.get(timeout=NOTHING_S)
        assert line, f"process {self._process.pid} ended"
        return line

    def _read(self, stream: Any) -> None:
        for line in stream:
            self.lines.put(line)
        self.lines.put("")


class Controller:
    """A controller process on a port that stays its own when it is started again."""

    def __init__(self, home: Path) -> None:
        token = home / "token"
        token.write_text(TOKEN.hex())
        token.chmod(0o600)
        port = sockets.free_port("127.0.0.1")
        settings = {"fleet": "t", "token_file": str(token), "state_dir": str(home / "state"), "port": port}
        self._settings = home / "controller.json"
        self._settings.write_text(json.dumps(settings))
        self.url = f"http://127.0.0.1:{port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "vllm_fleet.controller", "--settings", str(self._settings)]
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        said = Said(self.process, self.process.stderr)
        while "controller.start" not in said.next():
            pass

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)
        assert self.process.stderr is not None
        self.process.stderr.close()


class Worker:
    """One worker process. ``ask`` waits for its answer; ``tell`` and ``answer`` do that in two steps."""

    def __init__(self, url: str, library: str = "gloo", device: int = 0) -> None:
        self.name = ""
        self.answered_at = 0.0
        """When it gave its last answer, by the monotonic clock that all processes of a host share."""
        command = [sys.executable, "-m", "tests.contract.group_worker", url, bearer(TOKEN), library, str(device)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._said = Said(self.process, self.process.stdout)

    def until_ready(self) -> None:
        self.note()

    def note(self) -> str:
        """What it says in the middle of a command."""
        return str(json.loads(self._said.next())["note"])

    def tell(self, do: str, **arguments: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        """The answer, or "ErrorType: text"."""
        said = json.loads(self._said.next())
        self.answered_at = said["at"]
        return said["answer"] if "answer" in said else f"{said['error']}: {said['text']}"

    def ask(self, do: str, **arguments: Any) -> Any:
        self.tell(do, **arguments)
        return self.answer()

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)

    def close(self) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGCONT)
        self.kill()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


def all_ask(workers: list[Worker], do: str, **arguments: Any) -> list[Any]:
    """Ask all at once; their answers in order."""
    for worker in workers:
        worker.tell(do, **arguments)
    return [worker.answer() for worker in workers]


class Workers:
    """Workers that are kept from test to test: starting one takes seconds, most of it for importing torch."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._all: list[Worker] = []
        self._used: list[Worker] = []

    def take(self, names: str) -> list[Worker]:
        """A worker for each letter, which is its name."""
        idle = [worker for worker in self._all if worker not in self._used]
        fresh = [Worker(self._url) for _ in names[len(idle) :]]
        for worker in fresh:
            worker.until_ready()
        self._all += fresh
        taken = [*idle, *fresh][: len(names)]
        for worker, name in zip(taken, names, strict=True):
            worker.name = name
        self._used += taken
        return taken

    def give_back(self) -> None:
        """Those that live leave their groups; the others are forgotten."""
        for worker in self._used:
            if worker.process.poll() is not None:
                worker.close()
                self._all.remove(worker)
            else:
                assert worker.ask("reset") is None
        self._used = []

    def close(self) -> None:
        for worker in self._all:
            worker.close()
