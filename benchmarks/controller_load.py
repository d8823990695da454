"""Mock members and watchers of a controller: a thousand of them in one process, over real connections."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import cast

from vllm_fleet.wire import control

HEAD_END = b"\r\n\r\n"


@dataclass(frozen=True)
class Target:
    """The controller under load."""

    host: str
    port: int
    bearer: str

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """One request as bytes, as the fleet's own clients send it."""
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nAuthorization: Bearer {self.bearer}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


class Member(asyncio.Protocol):
    """One instance on one kept connection: registers, then sends heartbeats for ever."""

    def __init__(self, target: Target, name: str, number: int) -> None:
        self.name = name
        self.answers_s: list[float] = []
        self.failures = 0
        self.skipped = 0
        """Heartbeats that were due while the one before was not answered yet."""
        self.registered: control.Registered | None = None
        self._target = target
        self._loop = asyncio.get_running_loop()
        self._hello = control.Register(
            name, "both", f"http://10.0.0.{number % 250}:{8000 + number}", 1000 + number, f"{name}-life-1", "ready",
            {"model": "/models/a-model-of-usual-length", "dtype": "bfloat16", "block_size": "16", "vllm": "0.32.0"},
        )  # fmt: skip
        self._beat = b""
        self._asked_at = 0.0
        self._asking = False
        self._every_s = 0.0
        self._answered: asyncio.Future[bytes] | None = None
        self._beating: asyncio.TimerHandle | None = None
        self._pending = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._pending += data
        head, end, body = self._pending.partition(HEAD_END)
        if not end or len(body) < _length(head):
            return
        self._pending, self._asking = b"", False
        good = head.startswith((b"HTTP/1.1 200", b"HTTP/1.1 204"))
        self.failures += not good
        self.answers_s.append(time.perf_counter() - self._asked_at)
        if good and b'"heartbeat_s"' in body and (told_s := control.decode_heartbeat_ack(body).heartbeat_s):
            self._every_s = told_s
        if self._answered is not None and not self._answered.done():
            self._answered.set_result(body if good else b"")

    def connection_lost(self, error: Exception | None) -> None:
        self.failures += self._beating is not None
        self.close()

    async def ask(self, method: str, path: str, body: bytes = b"") -> bytes:
        """One request and its answer, empty where it was refused."""
        self._answered = self._loop.create_future()
        self._send(self._target.request(method, path, body))
        async with asyncio.timeout(60.0):
            return await self._answered

    async def register(self) -> float:
        """Seconds from asking to the answer."""
        body = await self.ask("POST", "/v1/members", control.encode(self._hello))
        self.registered = control.decode_registered(body)
        beat = control.encode(control.Heartbeat(self.registered.generation, "ready"))
        self._beat = self._target.request("POST", f"/v1/members/{self.name}/heartbeat", beat)
        return self.answers_s.pop()

    async def leave(self) -> None:
        """Deregister."""
        assert self.registered is not None
        await self.ask("DELETE", f"/v1/members/{self.name}?generation={self.registered.generation}")

    def begin(self, every_s: float, phase_s: float) -> None:
        """Send heartbeats from now on."""
        self._every_s = every_s
        self._beating = self._loop.call_later(phase_s, self._send_beat, self._loop.time() + phase_s)

    def close(self) -> None:
        if self._beating is not None:
            self._beating.cancel()
            self._beating = None
        self._transport.close()

    def _send_beat(self, due: float) -> None:
        due += self._every_s  # not from now: lateness here must not thin out the load
        self._beating = self._loop.call_at(due, self._send_beat, due)
        self._answered = None
        if self._asking:
            self.skipped += 1
        else:
            self._send(self._beat)

    def _send(self, request: bytes) -> None:
        self._asked_at, self._asking = time.perf_counter(), True
        self._transport.write(request)


class Watcher(asyncio.Protocol):
    """One follower of the fleet: tells ``on_change`` of each line about a member as it comes."""

    def __init__(self, target: Target, on_change: Callable[[bytes, float], None]) -> None:
        self.lines = 0
        self._target, self._on_change = target, on_change
        self._pending = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._target.request("GET", "/v1/watch"))

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            if line.startswith(b"{"):
                self.lines += 1
                if b'"change"' in line[:20]:
                    self._on_change(line, now)

    def close(self) -> None:
        self._transport.close()


@dataclass
class Fleet:
    """All mock members and watchers; what they ask for says how long it took."""

    target: Target
    members: list[Member] = field(default_factory=list)
    watchers: list[Watcher] = field(default_factory=list)
    _seen: dict[str, list[float]] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    async def connect(self, name: str) -> Member:
        """A member on its own connection, not registered yet."""
        number = next(self._numbers)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(30.0):
            _, member = await loop.create_connection(
                lambda: Member(self.target, name, number), self.target.host, self.target.port
            )
        return member

    async def register_at_once(self, count: int) -> tuple[float, list[float]]:
        """``count`` members connect and register in one moment; seconds until the last answer, and of each answer."""

        async def one(number: int) -> float:
            began = time.perf_counter()
            member = await self.connect(f"instance-{number}")
            self.members.append(member)
            await member.register()
            return time.perf_counter() - began

        began = time.perf_counter()
        took = await asyncio.gather(*(one(number) for number in range(count)))
        whole_s = time.perf_counter() - began
        generations = {member.registered.generation for member in self.members if member.registered}
        assert len(generations) == count, f"{len(generations)} generations for {count} members"
        return whole_s, list(took)

    def begin(self, every_s: float, rng: random.Random) -> None:
        """Every member sends heartbeats, each in its own phase."""
        for member in self.members:
            member.begin(every_s, rng.uniform(0, every_s))

    async def watch(self, count: int) -> float:
        """``count`` watchers connect at once; seconds until the last has its snapshot."""

        def on_change(line: bytes, now: float) -> None:
            name = line.partition(b'"name":"')[2].partition(b'"')[0].decode()
            if name in self._seen:
                self._seen[name].append(now)

        loop = asyncio.get_running_loop()
        began = time.perf_counter()
        for _ in range(count):
            _, watcher = await loop.create_connection(
                lambda: Watcher(self.target, on_change), self.target.host, self.target.port
            )
            self.watchers.append(watcher)
        async with asyncio.timeout(60.0):
            while not all(watcher.lines for watcher in self.watchers):  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(0.002)
        return time.perf_counter() - began

    async def change(self, name: str) -> list[float]:
        """A member comes: seconds from its asking until each watcher has the news. Then it leaves again."""
        member = await self.connect(name)
        self._seen[name] = []
        began = time.perf_counter()
        await member.register()
        async with asyncio.timeout(10.0):
            while len(self._seen[name]) < len(self.watchers):  # noqa: ASYNC110 - what is waited for has no event to offer
                await asyncio.sleep(0.002)
        took = [at - began for at in self._seen.pop(name)]
        await member.leave()
        member.close()
        return took

    def close(self) -> None:
        for member in self.members:
            member.close()
        for watcher in self.watchers:
            watcher.close()


def _length(head: bytes) -> int:
    return int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
