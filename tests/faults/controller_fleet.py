"""Real controllers with a journal on disk, members in another process, a watcher, and a cable that can be cut."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from tests.faults.etcd_fleet import Client, Members, eventually
from vllm_fleet.config.connector import bearer
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.net.control_client import ControlClient
from vllm_fleet.net.sockets import free_port
from vllm_fleet.net.watch import watch
from vllm_fleet.wire.control import Change, Heartbeat, HeartbeatAck, News, Snapshot

TOKEN = bytes(range(32))
RULES = {"heartbeat_s": 0.2, "suspect_s": 0.8, "lease_s": 2.5}
BEAT_CALL_S = 0.4
LEASE_S = RULES["lease_s"]


class FleetClient(Client):
    """A client of one fleet, with that fleet's token."""

    def __init__(self, url: str, bearer_token: str) -> None:
        ControlClient.__init__(self, url, bearer_token)

    def heartbeat(self, name: str, beat: Heartbeat, deadline: Deadline) -> HeartbeatAck:
        """Given up soon: a member that hears nothing must go on to speak several times within its lease."""
        return super().heartbeat(name, beat, deadline.capped(BEAT_CALL_S))


class Process:
    """A child, and what may happen to it. Each step returns when the kernel shows that it happened."""

    def __init__(self, argv: list[str], log: Path, env: dict[str, str] | None = None) -> None:
        self.log_file = log
        with log.open("ab") as out:
            self._child = subprocess.Popen(argv, stdout=out, stderr=out, env={**os.environ, **(env or {})})
        self.pid = self._child.pid

    def kill(self) -> None:
        if self._child.poll() is None:
            self._child.kill()
        self._child.wait(10)

    def pause(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        eventually("it is stopped", lambda: self._stat() == "T")

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)
        eventually("it goes on", lambda: self._stat() != "T")

    def ended(self, within_s: float = 20.0) -> int:
        """Its exit status."""
        return self._child.wait(within_s)

    def running(self) -> bool:
        return self._child.poll() is None

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def _stat(self) -> str:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]


class Controller:
    """One fleet's controller: the same port and state folder over all its lives."""

    def __init__(self, folder: Path, fleet: str = "test", token: bytes = TOKEN, state_dir: Path | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self.fleet = folder, fleet
        self.bearer = bearer(token)
        token_file = folder / f"{fleet}.token"
        token_file.touch(mode=0o600)
        token_file.write_text(token.hex())
        self.state_dir = state_dir or folder / "state"
        self.port = free_port("127.0.0.1")
        self.url = f"http://127.0.0.1:{self.port}"
        self._settings = {
            "fleet": fleet, "token_file": str(token_file), "port": self.port, "state_dir": str(self.state_dir), **RULES
        }  # fmt: skip
        self.env: dict[str, str] = {}
        self.process: Process | None = None

    @property
    def journal(self) -> Path:
        return self.state_dir / "journal"

    def launch(self) -> Process:
        """Start it and do not wait."""
        file = self._folder / f"{self.fleet}.json"
        file.write_text(json.dumps(self._settings))
        argv = [sys.executable, "-m", "vllm_fleet.controller", "--settings", str(file)]
        self.process = Process(argv, self._folder / f"{self.fleet}.log", self.env)
        return self.process

    def rule(self, **rules: float) -> None:
        """Other times from the next start on."""
        self._settings = {**self._settings, **rules}

    def start(self) -> Controller:
        """Start it; returns when it answers."""
        process = self.launch()

        def up() -> bool:
            assert process.running(), f"the controller has ended: {process.log()}"
            return self.health() is not None

        eventually("the controller answers", up, within_s=30.0)
        return self

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()

    def health(self) -> dict[str, Any] | None:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=1.0) as answer:
                found: dict[str, Any] = json.loads(answer.read())
                return found
        except (urllib.error.URLError, OSError):
            return None

    def is_durable(self) -> bool:
        return (self.health() or {}).get("durable") is True

    def client(self, url: str = "") -> FleetClient:
        return FleetClient(url or self.url, self.bearer)

    def lives(self) -> dict[str, tuple[str, int]]:
        """Incarnation and generation of each member."""
        snapshot = self.client().try_snapshot(5.0)
        assert snapshot is not None, "the controller does not answer"
        return {member.name: (member.incarnation, member.generation) for member in snapshot.members}

    def states(self) -> dict[str, str]:
        snapshot = self.client().try_snapshot(5.0)
        return {} if snapshot is None else {member.name: member.state for member in snapshot.members}

    def log_end(self) -> str:
        """Its last events."""
        assert self.process is not None
        return self.process.log()[-2000:]

    def all_ready(self, *names: str) -> bool:
        return self.states() == dict.fromkeys(names, "ready")

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()


class View:
    """What a router sees: watches from a thread, checks each event, keeps the last view."""

    def __init__(self, url: str, bearer_token: str) -> None:
        self.members: dict[str, tuple[str, int]] = {}
        self.states: dict[str, str] = {}
        self.journals: list[str] = []
        self.gone: list[str] = []
        self.wrong: list[str] = []
        self.events = 0
        self._newest: dict[str, int] = {}
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(watch(url, bearer_token, self._on_event))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _on_event(self, event: News) -> None:
        self.events += 1
        if isinstance(event, Snapshot):
            if event.controller not in self.journals:
                self.journals.append(event.controller)
            members, states = {}, {}
            for member in event.members:
                members[member.name], states[member.name] = (member.incarnation, member.generation), member.state
                self._check(member.name, member.generation)
            self.members, self.states = members, dict(states)
        elif isinstance(event, Change):
            member = event.member
            self._check(member.name, member.generation)
            if member.state == "gone":
                self.gone.append(member.name)
                self.members.pop(member.name, None)
                self.states.pop(member.name, None)
            else:
                self.members[member.name] = (member.incarnation, member.generation)
                self.states[member.name] = member.state

    def _check(self, name: str, generation: int) -> None:
        if generation < self._newest.get(name, 0):
            self.wrong.append(f"{name} went back from generation {self._newest[name]} to {generation}")
        self._newest[name] = max(generation, self._newest.get(name, 0))

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(asyncio.gather(self._task, return_exceptions=True))
        finally:
            self._loop.close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(10)
        assert not self.wrong, self.wrong


class PlayedMembers:
    """Members in another process, which may be stopped and continued; what they were told comes back by a file."""

    def __init__(
        self, controller: Controller, folder: Path, count: int, url: str = "", env: dict[str, str] | None = None
    ) -> None:
        self.names = [f"m{number}" for number in range(count)]
        self._told = folder / f"members-{controller.fleet}.json"
        target = url or controller.url
        argv = [sys.executable, "-m", "tests.faults.controller_fleet", target, controller.bearer, str(count)]
        self.process = Process([*argv, str(self._told)], folder / f"members-{controller.fleet}.log", env)
        try:
            eventually("all have joined", self._joined, within_s=30.0)
        except AssertionError:
            self.close()
            raise

    def _joined(self) -> bool:
        assert self.process.running(), f"the members have ended: {self.process.log()}"
        return len(self.answers) >= len(self.names)

    @property
    def answers(self) -> list[tuple[int, str, str]]:
        """Generation, name and life of each registration that was answered."""
        return [(int(generation), name, life) for generation, name, life in self._read("answers")]

    def newest(self) -> dict[str, tuple[str, int]]:
        """Life and generation of each member, as it was told last."""
        return {name: (life, generation) for generation, name, life in self.answers}

    @property
    def beats(self) -> int:
        """Heartbeats that were answered."""
        return int(self._read("beats") or 0)

    def await_beats(self, count: int = 0) -> None:
        """So many more heartbeats are answered; by default three of each member."""
        before, more = self.beats, count or 3 * len(self.names)
        eventually("heartbeats go on", lambda: self.beats >= before + more)

    def _read(self, key: str) -> Any:
        try:
            return json.loads(self._told.read_text())[key]
        except FileNotFoundError:
            return []

    def close(self) -> None:
        self.process.kill()


def play(url: str, bearer_token: str, count: int, told: Path) -> None:
    """The other process: members, and what they were told, until it is killed."""
    members = Members(FleetClient(url, bearer_token), count)
    forever = threading.Event()
    while not forever.wait(0.05):
        fresh = told.with_suffix(".new")
        fresh.write_text(json.dumps({"answers": members.answers, "beats": members.beats}))
        fresh.rename(told)


class Cable:
    """Passes TCP on to a port. A direction that is cut holds its bytes back, as a network that loses every packet does:
    nobody is told, and what was sent comes through once it is mended.
    """

    def __init__(self, port: int) -> None:
        self.held_bytes = {"up": 0, "down": 0}
        self._target = port
        self._loop = asyncio.new_event_loop()
        self._ready, self._stop = threading.Event(), asyncio.Event()
        self._whole = {"up": asyncio.Event(), "down": asyncio.Event()}
        for direction in self._whole.values():
            direction.set()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))
        self._thread.start()
        assert self._ready.wait(5)
        self.url = f"http://127.0.0.1:{self.port}"

    def cut(self, *directions: str) -> None:
        for direction in directions:
            self._loop.call_soon_threadsafe(self._whole[direction].clear)

    def mend(self) -> None:
        for direction in self._whole.values():
            self._loop.call_soon_threadsafe(direction.set)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self._loop.close()

    async def _serve(self) -> None:
        connections: set[asyncio.Task[None]] = set()

        def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.ensure_future(self._connection(reader, writer))
            connections.add(task)
            task.add_done_callback(connections.discard)

        server = await asyncio.start_server(accepted, "127.0.0.1", 0)
        self.port = int(server.sockets[0].getsockname()[1])
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in list(connections):
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with _closing(writer):
            try:
                their_reader, their_writer = await asyncio.open_connection("127.0.0.1", self._target)
            except OSError:
                return
            async with _closing(their_writer):
                await asyncio.gather(self._pass(reader, their_writer, "up"), self._pass(their_reader, writer, "down"))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: str) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(1 << 16):
                if not self._whole[direction].is_set():
                    self.held_bytes[direction] += len(chunk)
                await self._whole[direction].wait()
                writer.write(chunk)
                await writer.drain()
        await self._whole[direction].wait()
        writer.close()


@asynccontextmanager
async def _closing(writer: asyncio.StreamWriter) -> AsyncIterator[None]:
    try:
        yield
    finally:
        writer.transport.abort()


@contextmanager
def small_disk(folder: Path) -> Iterator[SmallDisk]:
    """A disk of 1 MiB at ``folder``. Raises OSError where this system lets nobody mount."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise OSError(done.stderr.strip())
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


class SmallDisk:
    """A mounted disk that can be filled, freed, and made read-only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self) -> None:
        """Write until nothing more fits, and see that it does not."""
        with (self.folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        found = os.statvfs(self.folder)
        assert found.f_bavail == 0, f"{found.f_bavail} blocks are free"

    def free(self) -> None:
        (self.folder / "filler").unlink()

    def make_read_only(self) -> None:
        """As a disk with errors gets: files that are open for writing are refused as well."""
        subprocess.run(["mount", "-o", "remount,ro", str(self.folder)], check=True, capture_output=True)

    def make_writable(self) -> None:
        subprocess.run(["mount", "-o", "remount,rw", str(self.folder)], check=True, capture_output=True)


if __name__ == "__main__":
    play(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
