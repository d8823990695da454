"""Asking over real loopback sockets: connections kept and given up, answers that break, readers that are slow."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from vllm_fleet.core import limits
from vllm_fleet.core.errors import BadRequest
from vllm_fleet.net import sockets
from vllm_fleet.net.http.client import Pool
from vllm_fleet.net.http.messages import BrokenOff, NotHttp, Unreachable

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-A: 1\r\n\r\nhi"
CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"

Peer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Server:
    """Answers with what a test says, question by question."""

    url: str
    pool: Pool
    answers: list[bytes] = field(default_factory=list)
    """For one question each; empty: the connection is closed instead."""
    questions: list[bytes] = field(default_factory=list)
    closing: bool = False
    """Connections are closed after the next answer."""
    connections: int = 0
    left: int = 0
    """Connections that the client closed."""

    async def serve(self, receiving: asyncio.StreamReader, sending: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                try:
                    head = await receiving.readuntil(b"\r\n\r\n")
                except asyncio.IncompleteReadError:
                    self.left += 1
                    break
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
                self.questions.append(head + await receiving.readexactly(length))
                answer = self.answers.pop(0) if self.answers else OK
                sending.write(answer)
                if self.closing or not answer or b"Connection: close" in answer:
                    break
        sending.close()

    async def get(self, path: str = "/", bytes_max: int = 1000) -> bytes | None:
        async with asyncio.timeout(5), self.pool.ask("GET", self.url + path, {}) as answer:
            return await answer.read(bytes_max)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    pool = Pool(connect_s=2.0, idle_s=3.0)
    one = Server("", pool)
    with sockets.listen("127.0.0.1", 0, setting="test") as listener:
        one.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        listening = await asyncio.start_server(one.serve, sock=listener)
        yield one
        await pool.close()
        listening.close()
        await until(lambda: len(asyncio.all_tasks()) == 1)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5.0):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event to offer
            await asyncio.sleep(0.001)


async def test_what_is_asked(server: Server) -> None:
    async with server.pool.ask("POST", f"{server.url}/a?b=c", {"x-y": "é"}, b"body") as answer:
        assert (answer.status, answer.headers) == (200, [("Content-Length", "2"), ("X-A", "1")])
        assert [chunk async for chunk in answer.chunks()] == [b"hi"]
    host = server.url.removeprefix("http://").encode()
    assert server.questions == [
        b"POST /a?b=c HTTP/1.1\r\nHost: %b\r\nx-y: \xe9\r\nContent-Length: 4\r\n\r\nbody" % host
    ]


async def test_a_connection_is_kept(server: Server) -> None:
    for _ in range(3):
        assert await server.get() == b"hi"
    assert (server.connections, server.pool.counts()) == (1, (1, 1))


async def test_questions_at_once_have_connections_of_their_own(server: Server) -> None:
    assert await asyncio.gather(*(server.get() for _ in range(3))) == [b"hi"] * 3
    assert (server.connections, server.pool.counts()) == (3, (3, 3))


@pytest.mark.parametrize(
    "answer",
    [
        OK.replace(b"X-A: 1", b"Connection: close"),
        OK + b"more",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi",
    ],
)
async def test_a_connection_is_not_kept_when_it_cannot_be(server: Server, answer: bytes) -> None:
    server.answers = [answer]
    assert [await server.get(), await server.get()] == [b"hi", b"hi"]
    assert server.connections == 2
    await until(lambda: server.pool.counts() == (1, 1))


async def test_an_answer_that_is_not_read_costs_its_connection(server: Server) -> None:
    server.answers = [CHUNKS + b"2\r\nhi\r\n"]
    async with server.pool.ask("GET", server.url, {}) as answer:
        assert answer.status == 200
    await until(lambda: server.left == 1)
    assert server.pool.counts() == (0, 0)


async def test_who_stops_waiting_closes_the_connection(server: Server) -> None:
    server.answers = [b"HTTP/1.1 200 OK\r\n"]
    asking = asyncio.create_task(server.get())
    await until(lambda: server.questions)
    asking.cancel()
    await until(lambda: server.left == 1)
    assert server.pool.counts() == (0, 0)


async def test_an_idle_connection_that_the_server_closed_is_not_used(server: Server) -> None:
    server.answers = [OK]
    assert await server.get() == b"hi"
    server.answers = [b""]
    with pytest.raises(BrokenOff) as broken:
        await server.get()
    assert broken.value.stale, "it was kept, and nothing came"
    assert server.pool.counts() == (0, 0)
    assert await server.get() == b"hi"


async def test_a_first_question_that_is_not_answered_is_not_stale(server: Server) -> None:
    server.answers = [b""]
    with pytest.raises(BrokenOff) as broken:
        await server.get()
    assert not broken.value.stale


@pytest.mark.parametrize("answer", [b"HTTP/1.1 2", OK[:-1], CHUNKS + b"2\r\nhi\r\n"])
async def test_an_answer_that_breaks_off_is_not_stale(server: Server, answer: bytes) -> None:
    await server.get()
    server.answers, server.closing = [answer], True
    with pytest.raises(BrokenOff) as broken:
        await server.get()
    assert not broken.value.stale


async def test_a_body_that_ends_with_the_connection(server: Server) -> None:
    server.answers = [b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhi"]
    assert await server.get() == b"hi"


async def test_what_came_before_the_end_is_given_first(server: Server) -> None:
    server.answers = [CHUNKS.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + b"2\r\nhi\r\n"]
    async with server.pool.ask("GET", server.url, {}) as answer:
        chunks = answer.chunks()
        assert await anext(chunks) == b"hi"
        with pytest.raises(BrokenOff):
            await anext(chunks)


async def test_what_is_no_answer(server: Server) -> None:
    server.answers = [b"SSH-2.0-x\r\n\r\n"]
    with pytest.raises(NotHttp):
        await server.get()
    await until(lambda: server.pool.counts() == (0, 0))


async def test_a_body_that_is_too_long(server: Server) -> None:
    assert await server.get(bytes_max=1) is None


async def test_nobody_there(server: Server) -> None:
    with pytest.raises(Unreachable, match="cannot connect"):
        async with server.pool.ask("GET", f"http://127.0.0.1:{sockets.free_port('127.0.0.1')}", {}):
            pass


async def test_nobody_accepts() -> None:
    pool = Pool(connect_s=0.05, idle_s=1.0)
    with sockets.listen("127.0.0.1", 0, setting="test", backlog=0) as listener:
        address = listener.getsockname()
        with socket.create_connection(address), pytest.raises(Unreachable, match=r"0\.05"):
            async with pool.ask("GET", f"http://127.0.0.1:{address[1]}", {}):
                pass
    await pool.close()


@pytest.mark.parametrize("url", ["https://h", "ftp://h", "h", "http://", "http://h/a b", "http://h/a\r\nb: c"])
async def test_urls_that_are_not_asked(server: Server, url: str) -> None:
    with pytest.raises(BadRequest):
        server.pool.ask("GET", url, {})


async def test_a_slow_reader_makes_the_server_wait(server: Server) -> None:
    sent = 0
    blocked = asyncio.Event()

    async def serve(receiving: asyncio.StreamReader, sending: asyncio.StreamWriter) -> None:
        nonlocal sent
        await receiving.readuntil(b"\r\n\r\n")
        sending.write(b"HTTP/1.1 200 OK\r\n\r\n")
        with contextlib.suppress(ConnectionError, TimeoutError):
            while True:
                sending.write(b"x" * 65536)
                sent += 65536
                async with asyncio.timeout(0.3):
                    await sending.drain()
        blocked.set()
        sending.transport.abort()

    with sockets.listen("127.0.0.1", 0, setting="test") as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        listening = await asyncio.start_server(serve, sock=listener)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with server.pool.ask("GET", url, {}) as answer:
            assert answer.status == 200
            async with asyncio.timeout(10):
                await blocked.wait()
            kept = sum(map(len, answer._reader.parts))
            assert limits.ANSWER_AHEAD_BYTES_MAX <= kept < 4 * limits.ANSWER_AHEAD_BYTES_MAX
            assert sent < 32 << 20
        listening.close()


async def test_idle_connections_are_closed_after_a_while() -> None:
    pool = Pool(connect_s=1.0, idle_s=0.05)
    one = Server("", pool)
    with sockets.listen("127.0.0.1", 0, setting="test") as listener:
        one.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        listening = await asyncio.start_server(one.serve, sock=listener)
        assert await one.get() == b"hi"
        await until(lambda: one.left == 1)
        assert pool.counts() == (0, 0)
        await pool.close()
        listening.close()


async def test_a_unix_socket_is_asked(server: Server, tmp_path: Path) -> None:
    listening = await asyncio.start_unix_server(server.serve, tmp_path / "s")
    async with server.pool.ask("GET", f"unix:{tmp_path}/s:/a", {}) as answer:
        assert await answer.read(10) == b"hi"
    assert server.questions[0].startswith(b"GET /a HTTP/1.1\r\nHost: localhost\r\n")
    listening.close()
