"""The blocking client and the watcher against servers that misbehave, over real loopback sockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from vllm_fleet.core import limits
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import BadRequest, Busy, Corrupt, PeerGone
from vllm_fleet.net import sockets
from vllm_fleet.net.control_client import ControlClient
from vllm_fleet.net.watch import watch
from vllm_fleet.wire.control import News

BEARER = "b" * 64


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another task brings about."""
    async with asyncio.timeout(10.0):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event to offer
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def answering(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    """A server of ours that says what a test wants; its URL. Ends after its last connection."""
    busy = 0

    async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal busy
        busy += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await serve(reader, writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        busy -= 1

    listener = sockets.listen("127.0.0.1", 0, setting="test")
    async with await asyncio.start_server(served, sock=listener) as server:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.close()
        await asyncio.sleep(0.02)  # a connection accepted a moment ago begins to be served
        await until(lambda: busy == 0)


@contextlib.asynccontextmanager
async def following(url: str, events: list[News]) -> AsyncIterator[asyncio.Task[None]]:
    """A running watch, cancelled at the end."""
    task = asyncio.create_task(watch(url, BEARER, events.append))
    try:
        yield task
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
        b'HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{"type":"unknown"}\n',
        b'HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{"type":"still_here","revision":-1}\n',
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + b"x" * 5000,
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + b"[" * 4000 + b"\n",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n\xff\n",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n",
    ],
)
async def test_watch_never_raises_for_what_a_server_says(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "WATCH_LINE_BYTES_MAX", 4096)
    monkeypatch.setattr(limits, "WATCH_BACKOFF_S_MAX", 0.02)
    monkeypatch.setattr(limits, "WATCH_BACKOFF_S_MIN", 0.01)
    calls = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        calls += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()

    events: list[News] = []
    async with answering(serve) as url, following(url, events) as task:
        await until(lambda: calls >= 3)
        assert not task.done()
    assert events == []


async def test_watch_takes_silence_for_death(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "WATCH_SILENCE_S", 0.1)
    calls = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        calls += 1
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        await reader.read(-1)

    async with answering(serve) as url, following(url, []):
        await until(lambda: calls >= 2)


async def test_watch_starts_anew_after_bytes_it_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "WATCH_BACKOFF_S_MAX", 0.01)
    monkeypatch.setattr(limits, "WATCH_BACKOFF_S_MIN", 0.01)
    asked: list[bytes] = []
    snapshot = b'{"type":"snapshot","controller":"j","revision":5,"members":[]}\n'
    tails = [b"", b"noise\n", b"", b""]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readuntil(b"\r\n\r\n")).split(b" ")[1])
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + snapshot + tails[min(len(asked), 4) - 1])
        await writer.drain()

    async with answering(serve) as url, following(url, []):
        await until(lambda: len(asked) >= 4)
    resumed = b"/v1/watch?since=5&controller=j"
    assert asked[:4] == [b"/v1/watch", resumed, b"/v1/watch", resumed]


async def test_what_the_caller_raises_ends_the_watch() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        writer.write(b'{"type":"snapshot","controller":"j","revision":5,"members":[]}\n')
        await reader.read(-1)

    def broken(event: News) -> None:
        raise ZeroDivisionError

    async with answering(serve) as url:
        with pytest.raises(ZeroDivisionError):
            await watch(url, BEARER, broken)


def test_client_names_what_is_wrong_before_anyone_answers() -> None:
    with pytest.raises(PeerGone, match="cannot connect"):
        ControlClient("http://127.0.0.1:1", BEARER).snapshot(Deadline.after(5.0, "test"))
    with pytest.raises(BadRequest, match="must be http://HOST:PORT"):
        ControlClient("https://127.0.0.1:1", BEARER)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", Corrupt),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", Corrupt),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + b"x" * 5000, Corrupt),
        (b"nonsense", Corrupt),
        (b"", PeerGone),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 1\r\n\r\n?", Busy),
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n", BadRequest),
    ],
)
async def test_client_maps_what_a_server_says(
    answer: bytes, expected: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "CONTROL_ANSWER_BYTES_MAX", 4096)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()

    async with answering(serve) as url:
        with pytest.raises(expected):
            await asyncio.to_thread(ControlClient(url, BEARER).snapshot, Deadline.after(5.0, "test"))


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b""])
async def test_client_keeps_its_deadline_when_bytes_trickle(head: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        while True:
            writer.write(b"H")
            await writer.drain()
            await asyncio.sleep(0.02)

    async with answering(serve) as url:
        with pytest.raises(PeerGone, match="did not finish GET /v1/members within"):
            await asyncio.to_thread(ControlClient(url, BEARER).snapshot, Deadline.after(0.3, "test"))
