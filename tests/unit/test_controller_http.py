"""The HTTP layer over real loopback sockets: order, deadlines, bounds, and peers that do not read."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest

from vllm_fleet.controller.exchange import refusal
from vllm_fleet.controller.http import RULES, http_server
from vllm_fleet.core import limits
from vllm_fleet.net import sockets
from vllm_fleet.net.http.connection import Stage
from vllm_fleet.net.http.messages import Answer, Feed, Handled, Outlet, Request
from vllm_fleet.net.http.server import HttpServer

GET = b"GET %b HTTP/1.1\r\nHost: h\r\n\r\n"


@dataclass
class Tap(Feed):
    """A feed that a test writes to."""

    content_type: str = "text/plain"
    outlet: Outlet | None = None
    rooms: int = 0
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    def on_open(self, outlet: Outlet) -> None:
        self.outlet = outlet

    def on_room(self) -> None:
        self.rooms += 1

    def on_closed(self) -> None:
        self.closed.set()


class Echo:
    """A service: /now answers at once, /later when told to, /tap is a feed, /forbidden is refused by its head."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.tap = Tap()
        self.handled: list[str] = []

    def refuse(self, request: Request) -> Answer | None:
        return refusal(403, "forbidden", "no") if request.path == "/forbidden" else None

    def handle(self, request: Request) -> Handled:
        self.handled.append(request.path)
        if request.path == "/tap":
            return self.tap
        answer = Answer(204) if request.path == "/empty" else Answer(200, request.path.encode() + request.body)
        return self._later(answer) if request.path == "/later" else answer

    async def _later(self, answer: Answer) -> Answer:
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return answer


@dataclass
class Served:
    """A running server; ``sweep`` is called by tests, so that time is theirs."""

    service: Echo
    server: HttpServer
    port: int
    clients: list[asyncio.StreamWriter] = field(default_factory=list)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        receiving, sending = await asyncio.open_connection("127.0.0.1", self.port)
        self.clients.append(sending)
        return receiving, sending

    async def say(self, *pieces: bytes, end: bool = True) -> bytes:
        """What comes back for these bytes until the server closes; ``end``: our half is closed after them."""
        receiving, sending = await self.connect()
        for piece in pieces:
            sending.write(piece)
            await sending.drain()
        if end:
            sending.write_eof()
        async with asyncio.timeout(5.0):
            answer = await receiving.read(-1)
        sending.close()
        return answer

    def pass_time(self, seconds: float) -> None:
        """As if so much time had passed since the last event."""
        self.server.sweep(asyncio.get_running_loop().time() + seconds)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    listener = sockets.listen("127.0.0.1", 0, setting="test")
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # so that a peer that does not read is soon felt
    service = Echo()
    server = http_server(service)
    await server.start(listener)
    running = Served(service, server, listener.getsockname()[1])
    yield running
    for client in running.clients:
        client.transport.abort()
    await server.close(0.1)
    listener.close()


async def until(condition: Callable[[], object]) -> None:
    """Wait for what the other side of a socket brings about."""
    async with asyncio.timeout(10.0):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event to offer
            await asyncio.sleep(0.001)


async def opened(served: Served) -> Outlet:
    """The feed's outlet, once it is asked for."""
    await until(lambda: served.service.tap.outlet)
    outlet = served.service.tap.outlet
    assert outlet is not None
    return outlet


async def until_heard(receiving: asyncio.StreamReader, wanted: bytes) -> bytes:
    async with asyncio.timeout(5.0):
        return await receiving.readuntil(wanted)


def statuses(answers: bytes) -> list[int]:
    return [int(part[:3]) for part in answers.split(b"HTTP/1.1 ")[1:]]


async def test_a_connection_is_kept_and_answers_are_whole(served: Served) -> None:
    receiving, sending = await served.connect()
    for _ in range(3):
        sending.write(b"POST /now HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc")
        head = await until_heard(receiving, b"\r\n\r\n")
        assert head == b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 7\r\n\r\n"
        assert await receiving.readexactly(7) == b"/nowabc"


async def test_answers_keep_the_order_of_requests(served: Served) -> None:
    receiving, sending = await served.connect()
    sending.write(GET % b"/later" + GET % b"/now" + GET % b"/empty")
    await until(lambda: served.service.handled == ["/later"])
    served.service.go_on.set()
    heard = await until_heard(receiving, b"204 No Content\r\n\r\n")
    assert statuses(heard) == [200, 200, 204]
    assert heard.index(b"/later") < heard.index(b"/now")


@pytest.mark.parametrize("asks", [b"GET /now HTTP/1.0\r\n\r\n", b"GET /now HTTP/1.1\r\nConnection: close\r\n\r\n"])
async def test_the_connection_ends_where_the_peer_wants_it(served: Served, asks: bytes) -> None:
    answer = await served.say(asks, end=False)
    assert b"Connection: close\r\n" in answer
    assert answer.endswith(b"/now")


async def test_a_head_question_gets_no_body(served: Served) -> None:
    answer = await served.say(b"HEAD /now HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert answer.endswith(b"Content-Length: 4\r\nConnection: close\r\n\r\n")


async def test_a_body_is_called_for(served: Served) -> None:
    receiving, sending = await served.connect()
    sending.write(b"POST /now HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n")
    assert await until_heard(receiving, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    sending.write(b"abc")
    assert (await until_heard(receiving, b"/nowabc")).startswith(b"HTTP/1.1 200")


async def test_who_is_refused_reads_why_even_while_sending(served: Served) -> None:
    many = [b"x" * 65536] * 64
    receiving, sending = await served.connect()
    sending.write(b"POST /now HTTP/1.1\r\nContent-Length: 4194304\r\n\r\n")
    for piece in many:
        sending.write(piece)
        await sending.drain()
    assert statuses(await until_heard(receiving, b"too_large")) == [413]
    sending.close()
    assert served.service.handled == []
    assert statuses(await served.say(GET % b"/now" + GET % b"/forbidden" + GET % b"/now")) == [200, 403]


@pytest.mark.parametrize(
    ("pieces", "seconds", "status"),
    [
        ([b"GET / HT"], limits.CONTROL_HEAD_S, 408),
        ([b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\nx"], limits.CONTROL_BODY_S, 408),
        ([GET % b"/now" + b"G"], limits.CONTROL_HEAD_S, 408),
        ([b""], limits.CONTROL_HEAD_S, None),
        ([GET % b"/now"], limits.CONTROL_IDLE_S, None),
    ],
)
async def test_who_is_slow_is_told_and_left(served: Served, pieces: list[bytes], seconds: float, status: int) -> None:
    receiving, sending = await served.connect()
    for piece in pieces:
        sending.write(piece)
    answered = [200] if b"/now" in pieces[0] else []
    heard = b""
    if answered:
        heard = await until_heard(receiving, b"/now")
    await until(served.server.stages)
    if status:
        await until(lambda: served.server.stages()[0] in (Stage.HEAD, Stage.BODY))
    served.pass_time(seconds - 1.0)
    served.pass_time(seconds + 0.1)
    async with asyncio.timeout(5.0):
        heard += await receiving.read(-1)
    assert statuses(heard) == answered + ([status] if status else [])


async def test_more_of_the_same_head_wins_no_time(served: Served) -> None:
    receiving, sending = await served.connect()
    sending.write(b"GET / HTTP/1.1\r\n")
    await until(lambda: served.server.stages() == [Stage.HEAD])
    began = asyncio.get_running_loop().time()
    for number in range(20):
        sending.write(b"A%d: b\r\n" % number)
        await asyncio.sleep(0.01)
    served.server.sweep(began + limits.CONTROL_HEAD_S + 0.05)
    assert statuses(await until_heard(receiving, b"too_slow")) == [408]


async def test_connections_are_limited(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.server, "rules", dataclasses.replace(RULES, connections_max=1))
    receiving, sending = await served.connect()
    sending.write(GET % b"/now")
    await until_heard(receiving, b"/now")
    with contextlib.suppress(OSError):
        assert await served.say(GET % b"/now") == b""
    sending.write(GET % b"/now")
    await until_heard(receiving, b"/now")
    sending.close()
    await until(lambda: not served.server.stages())
    assert statuses(await served.say(GET % b"/now")) == [200]


async def test_nobody_works_for_a_peer_that_left(served: Served) -> None:
    _, sending = await served.connect()
    sending.write(GET % b"/later")
    await until(lambda: served.service.handled)
    sending.transport.abort()
    async with asyncio.timeout(5.0):
        await served.service.cancelled.wait()


async def test_a_feed_is_written_in_chunks_and_ends_in_order(served: Served) -> None:
    reading = asyncio.create_task(served.say(GET % b"/tap", end=False))
    tap = served.service.tap
    outlet = await opened(served)
    assert outlet.write(b"one\n")
    assert outlet.write(b"0123456789abcdef")
    outlet.end()
    assert (await reading).endswith(b"\r\n\r\n4\r\none\n\r\n10\r\n0123456789abcdef\r\n0\r\n\r\n")
    await tap.closed.wait()


async def test_an_old_client_gets_a_feed_without_chunks(served: Served) -> None:
    reading = asyncio.create_task(served.say(b"GET /tap HTTP/1.0\r\n\r\n", end=False))
    outlet = await opened(served)
    outlet.write(b"one\n")
    outlet.end()
    assert (await reading).endswith(b"\r\n\r\none\n")


@pytest.mark.parametrize("last", [b"more", b""])
async def test_a_feed_ends_when_its_peer_speaks_or_leaves(served: Served, last: bytes) -> None:
    _, sending = await served.connect()
    sending.write(GET % b"/tap")
    await opened(served)
    if last:
        sending.write(last)
    else:
        sending.write_eof()
    async with asyncio.timeout(5.0):
        await served.service.tap.closed.wait()


async def test_a_peer_that_does_not_read_its_feed_is_cut_off_after_a_while(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port)) as deaf:
        deaf.sendall(GET % b"/tap")
        tap = served.service.tap
        outlet = await opened(served)
        await until(lambda: not outlet.write(b"x" * 65536))
        served.pass_time(limits.WATCH_WRITE_S - 1.0)
        assert not tap.closed.is_set()
        served.pass_time(limits.WATCH_WRITE_S + 0.1)
        async with asyncio.timeout(5.0):
            await tap.closed.wait()


async def test_a_peer_that_catches_up_is_told_more(served: Served) -> None:
    receiving, sending = await served.connect()
    sending.write(GET % b"/tap")
    tap = served.service.tap
    outlet = await opened(served)
    await until(lambda: not outlet.write(b"x" * 65536))
    while not tap.rooms:
        await receiving.read(65536)
    served.pass_time(limits.WATCH_WRITE_S + 0.1)
    assert not tap.closed.is_set()


async def test_a_peer_that_asks_but_never_reads_is_not_heard_any_more(served: Served) -> None:
    long = b"POST /now HTTP/1.1\r\nContent-Length: 60000\r\n\r\n" + b"x" * 60_000
    _, sending = await served.connect()

    def stuck() -> bool:
        sending.write(long)
        return sending.transport.get_write_buffer_size() > 2 << 20

    await until(stuck)
    served.pass_time(limits.WATCH_WRITE_S + 0.1)
    await until(lambda: not served.server.stages())


async def test_closing_lets_what_is_under_way_end(served: Served) -> None:
    asking = asyncio.create_task(served.say(GET % b"/later", end=False))
    idle = asyncio.create_task(served.say(b"", end=False))
    await until(lambda: served.service.handled and len(served.server.stages()) == 2)
    closing = asyncio.create_task(served.server.close(5.0))
    assert await idle == b""
    served.service.go_on.set()
    await closing
    assert b"Connection: close" in await asking


async def test_closing_does_not_wait_for_ever(served: Served) -> None:
    asking = asyncio.create_task(served.say(GET % b"/later", end=False))
    await until(lambda: served.service.handled)
    await served.server.close(0.05)
    with contextlib.suppress(ConnectionError):
        assert await asking == b""
    assert served.service.cancelled.is_set()
