"""The HTTP server for anybody's clients, over real loopback sockets: framing, deadlines, and peers that leave."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.unit.test_net_http_reader import RULES, explain
from vllm_fleet.core.errors import Bug
from vllm_fleet.net import sockets
from vllm_fleet.net.http.connection import Stage
from vllm_fleet.net.http.encoding import encode_lines
from vllm_fleet.net.http.messages import Answer, Handled, PeerLeft, Request, Speaker
from vllm_fleet.net.http.server import HttpServer
from vllm_fleet.net.http.writer import Writer

GET = b"GET %b HTTP/1.1\r\nHost: h\r\n\r\n"


class Saying(Speaker):
    """Speaks as its path says."""

    def __init__(self, service: Service, request: Request) -> None:
        self.service, self.request = service, request

    async def speak(self, writer: Writer) -> None:
        service, path = self.service, self.request.path
        try:
            if path == "/long":
                writer.start(200, [("X-A", "1")], 10)
                writer.write(b"01234")
                await service.go_on.wait()
                writer.write(b"56789")
            elif path == "/stream":
                writer.start(200, [], None)
                writer.write(b"one")
                await service.go_on.wait()
                writer.write(b"two")
            elif path == "/short":
                writer.start(200, [], 10)
                writer.write(b"01234")
            elif path == "/silent":
                await service.go_on.wait()
            elif path == "/flood":
                writer.start(200, [], None)
                while True:
                    writer.write(b"x" * 65536)
                    await writer.drain()
                    await asyncio.sleep(0)
            elif path == "/early":
                writer.start(200, [], None)
                writer.flush()
                await service.go_on.wait()
            elif path == "/cut":
                writer.start(200, [], None)
                writer.write(b"half")
                writer.abort()
            elif path == "/nothing":
                writer.start(204, [], None)
            else:
                writer.start(200, [], None)
                writer.write(self.request.body)
        except (asyncio.CancelledError, PeerLeft):
            service.left.append(path)
            raise


class Service:
    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.left: list[str] = []
        self.handled: list[Request] = []

    def refuse(self, request: Request) -> Answer | None:
        return explain(404, "", "") if request.path == "/forbidden" else None

    def handle(self, request: Request) -> Handled:
        self.handled.append(request)
        if request.path == "/whole":
            return Answer(200, b"whole", "text/plain", (("X-A", "1"),))
        return Saying(self, request)


@dataclass
class Served:
    service: Service
    server: HttpServer
    port: int
    clients: list[asyncio.StreamWriter] = field(default_factory=list)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        receiving, sending = await asyncio.open_connection("127.0.0.1", self.port)
        self.clients.append(sending)
        return receiving, sending

    async def say(self, *pieces: bytes) -> bytes:
        """What comes back for these bytes until the server closes."""
        receiving, sending = await self.connect()
        for piece in pieces:
            sending.write(piece)
            await sending.drain()
        async with asyncio.timeout(5.0):
            return await receiving.read(-1)

    def pass_time(self, seconds: float) -> None:
        self.server.sweep(asyncio.get_running_loop().time() + seconds)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    listener = sockets.listen("127.0.0.1", 0, setting="test")
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    service = Service()
    rules = dataclasses.replace(RULES, head_s=5, body_s=5, idle_s=9, write_s=5, connections_max=100, body_rate_min=1000)
    server = HttpServer(service, rules, explain)
    await server.start(listener)
    running = Served(service, server, listener.getsockname()[1])
    yield running
    for client in running.clients:
        client.transport.abort()
    await server.close(0.1)
    listener.close()


@pytest.fixture
def tls(tmp_path: Path) -> ssl.SSLContext:
    """A certificate of our own making."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1))
    pem = made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    pem += key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "both.pem").write_bytes(pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "both.pem")
    return context


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5.0):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event to offer
            await asyncio.sleep(0.001)


async def heard(receiving: asyncio.StreamReader, end: bytes) -> bytes:
    async with asyncio.timeout(5.0):
        return await receiving.readuntil(end)


def undated(answer: bytes) -> bytes:
    lines = answer.split(b"\r\n")
    dates = [line for line in lines if line.startswith(b"Date: ")]
    assert dates
    assert all(date.endswith(b" GMT") for date in dates)
    return b"\r\n".join(line for line in lines if not line.startswith(b"Date: "))


def statuses(answers: bytes) -> list[int]:
    return [int(part[:3]) for part in answers.split(b"HTTP/1.1 ")[1:] if part[:3].isdigit()]


# Framing -------------------------------------------------------------------------------------------------------------


async def test_an_answer_of_known_length(served: Served) -> None:
    receiving, sending = await served.connect()
    for _ in range(2):
        served.service.go_on.set()
        sending.write(GET % b"/long")
        answer = undated(await heard(receiving, b"56789"))
        assert answer == b"HTTP/1.1 200 OK\r\nX-A: 1\r\nContent-Length: 10\r\n\r\n0123456789"


async def test_an_answer_in_parts_comes_as_it_is_made(served: Served) -> None:
    receiving, sending = await served.connect()
    sending.write(GET % b"/stream")
    first = undated(await heard(receiving, b"one\r\n"))
    assert first == b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n"
    served.service.go_on.set()
    assert await heard(receiving, b"0\r\n\r\n") == b"3\r\ntwo\r\n0\r\n\r\n"
    sending.write(GET % b"/whole")
    assert statuses(await heard(receiving, b"whole")) == [200]


@pytest.mark.parametrize("lines", [b"", b"Connection: keep-alive\r\n"])
async def test_an_old_client_gets_no_chunks(served: Served, lines: bytes) -> None:
    served.service.go_on.set()
    answer = undated(await served.say(b"GET /stream HTTP/1.0\r\n%b\r\n" % lines))
    assert answer == b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nonetwo"


async def test_an_old_client_may_keep_its_connection(served: Served) -> None:
    receiving, sending = await served.connect()
    for target, end in ((b"/long", b"56789"), (b"/whole", b"whole")):
        served.service.go_on.set()
        sending.write(b"GET %b HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" % target)
        assert b"\r\nConnection: keep-alive\r\n" in await heard(receiving, end)


async def test_head_gets_the_same_head_and_no_body(served: Served) -> None:
    served.service.go_on.set()
    ask = b"HEAD %b HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
    assert undated(await served.say(ask % b"/long")).endswith(
        b"X-A: 1\r\nContent-Length: 10\r\nConnection: close\r\n\r\n"
    )
    assert (await served.say(ask % b"/stream")).endswith(b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n")
    assert (await served.say(ask % b"/whole")).endswith(b"Connection: close\r\n\r\n")


async def test_an_answer_without_a_body(served: Served) -> None:
    receiving, sending = await served.connect()
    sending.write(GET % b"/nothing" + GET % b"/whole")
    assert undated(await heard(receiving, b"whole")).startswith(b"HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 200")


async def test_the_head_can_leave_before_the_body(served: Served) -> None:
    receiving, sending = await served.connect()
    sending.write(GET % b"/early")
    assert statuses(await heard(receiving, b"\r\n\r\n")) == [200]
    served.service.go_on.set()
    assert await heard(receiving, b"0\r\n\r\n") == b"0\r\n\r\n"


@pytest.mark.parametrize("path", [b"/cut", b"/short"])
async def test_an_answer_left_unfinished_cuts_the_connection(served: Served, path: bytes) -> None:
    receiving, sending = await served.connect()
    sending.write(GET % path)
    got = b""
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(5.0):
            got = await receiving.read(-1)
    assert not got.endswith((b"\r\n0\r\n\r\n", b"0123456789"))
    await until(lambda: not served.server.stages())


@pytest.mark.parametrize("value", ["a\r\nb: c", "a\nb", "a\rb", "a\0b"])
def test_a_header_cannot_forge_another(value: str) -> None:
    with pytest.raises(Bug):
        encode_lines([("a", value)])


# Requests ------------------------------------------------------------------------------------------------------------


async def test_pipelined_requests_are_answered_in_order(served: Served) -> None:
    receiving, sending = await served.connect()
    sending.write(GET % b"/stream" + GET % b"/whole" + GET % b"/long")
    await heard(receiving, b"one\r\n")
    assert [request.path for request in served.service.handled] == ["/stream"]
    served.service.go_on.set()
    rest = await heard(receiving, b"56789")
    assert rest.index(b"0\r\n\r\n") < rest.index(b"whole") < rest.index(b"01234")


async def test_who_sends_ahead_is_not_read_for_ever(served: Served) -> None:
    receiving, sending = await served.connect()
    sending.write(GET % b"/stream")
    await heard(receiving, b"one\r\n")
    sending.write(GET % b"/whole")
    await until(lambda: next(iter(served.server._open))._held)
    for _ in range(500):
        sending.write((GET % b"/whole") * 1000)
    sending.transport.set_write_buffer_limits(high=0)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await sending.drain()
    assert statuses(await stop_and_read(served, receiving, sending))[:1] == [200]


async def stop_and_read(served: Served, receiving: asyncio.StreamReader, sending: asyncio.StreamWriter) -> bytes:
    served.service.go_on.set()
    return await heard(receiving, b"whole")


@pytest.mark.parametrize(
    "ask",
    [
        b"POST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello",
        b"POST /echo HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
    ],
)
async def test_bodies(served: Served, ask: bytes) -> None:
    receiving, sending = await served.connect()
    for _ in range(2):
        sending.write(ask)
        assert (await heard(receiving, b"0\r\n\r\n")).endswith(b"\r\n\r\n5\r\nhello\r\n0\r\n\r\n")
    for at in range(len(ask)):
        sending.write(ask[at : at + 1])
        await asyncio.sleep(0)
    assert (await heard(receiving, b"0\r\n\r\n")).endswith(b"\r\n\r\n5\r\nhello\r\n0\r\n\r\n")


async def test_a_body_is_called_for(served: Served) -> None:
    receiving, sending = await served.connect()
    sending.write(b"POST /echo HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
    assert await heard(receiving, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    sending.write(b"hello")
    assert (await heard(receiving, b"0\r\n\r\n")).endswith(b"5\r\nhello\r\n0\r\n\r\n")


async def test_a_body_that_is_not_wanted_is_not_called_for(served: Served) -> None:
    ask = b"POST /forbidden HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"
    assert statuses(await served.say(ask)) == [404]


async def test_who_is_refused_reads_why_even_while_sending(served: Served) -> None:
    receiving, sending = await served.connect()
    sending.write(b"POST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: 4194304\r\n\r\n")
    for _ in range(64):
        sending.write(b"x" * 65536)
        await sending.drain()
    assert statuses(await heard(receiving, b"\r\n\r\n")) == [413]


# Deadlines -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "seconds", "status"),
    [
        (b"GET / HT", 5, 408),
        (b"POST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\nx", 5, 408),
        (b"", 5, None),
    ],
)
async def test_who_is_slow_is_told_and_left(served: Served, given: bytes, seconds: float, status: int | None) -> None:
    receiving, sending = await served.connect()
    sending.write(given)
    await until(served.server.stages)
    if status:
        await until(lambda: served.server.stages()[0] in (Stage.HEAD, Stage.BODY))
    served.pass_time(seconds - 1)
    assert not receiving.at_eof()
    served.pass_time(seconds + 0.1)
    async with asyncio.timeout(5):
        assert statuses(await receiving.read(-1)) == ([status] if status else [])


async def test_a_body_that_goes_on_wins_time(served: Served) -> None:
    receiving, sending = await served.connect()
    sending.write(b"POST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: 5000\r\n\r\n" + b"x" * 2000)
    await until(lambda: served.server.stages() == [Stage.BODY])
    await until(lambda: next(iter(served.server._open))._reader.body_bytes == 2000)
    served.pass_time(5.1)
    assert served.server.stages() == [Stage.BODY], "2,000 bytes at 1,000 a second are worth two seconds"
    served.pass_time(7.1)
    assert statuses(await heard(receiving, b"\r\n\r\n")) == [408]


async def test_an_idle_connection_is_closed(served: Served) -> None:
    receiving, sending = await served.connect()
    sending.write(GET % b"/whole")
    await heard(receiving, b"whole")
    served.pass_time(8.0)
    await asyncio.sleep(0)
    assert served.server.stages() == [Stage.IDLE]
    served.pass_time(9.1)
    async with asyncio.timeout(5):
        assert await receiving.read(-1) == b""


async def test_a_service_may_think_for_as_long_as_it_wants(served: Served) -> None:
    receiving, sending = await served.connect()
    sending.write(GET % b"/stream")
    await heard(receiving, b"one\r\n")
    served.pass_time(10_000)
    served.service.go_on.set()
    assert await heard(receiving, b"0\r\n\r\n")


# Peers that leave or do not read --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/silent", "/stream"])
@pytest.mark.parametrize("politely", [True, False])
async def test_nobody_works_for_a_peer_that_left(served: Served, path: str, politely: bool) -> None:
    _, sending = await served.connect()
    sending.write(GET % path.encode())
    await until(lambda: served.service.handled)
    if politely:
        sending.close()
    else:
        sending.transport.abort()
    await until(lambda: served.service.left == [path])
    await until(lambda: not served.server.stages())


async def test_who_does_not_read_makes_the_service_wait_and_is_cut_off(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port)) as deaf:
        deaf.sendall(GET % b"/flood")
        await until(lambda: served.server._open and next(iter(served.server._open)).blocked)
        buffered = next(iter(served.server._open)).transport.get_write_buffer_size()
        assert buffered < 1 << 20
        served.pass_time(4.0)
        assert served.service.left == []
        served.pass_time(5.1)
        await until(lambda: served.service.left == ["/flood"])


async def test_who_catches_up_gets_more(served: Served) -> None:
    receiving, sending = await served.connect()
    sending.write(GET % b"/flood")
    await until(lambda: served.server._open and next(iter(served.server._open)).blocked)
    got = 0
    while got < 4 << 20:
        got += len(await receiving.read(1 << 20))
    sending.transport.abort()
    await until(lambda: served.service.left == ["/flood"])


# The end -------------------------------------------------------------------------------------------------------------


async def test_closing_lets_answers_end(served: Served) -> None:
    receiving, sending = await served.connect()
    idle, _ = await served.connect()
    sending.write(GET % b"/stream")
    await heard(receiving, b"one\r\n")
    await until(lambda: len(served.server.stages()) == 2)
    closing = asyncio.create_task(served.server.close(5.0))
    assert await idle.read(-1) == b""
    served.service.go_on.set()
    assert await receiving.read(-1) == b"3\r\ntwo\r\n0\r\n\r\n"
    await closing


async def test_connections_are_limited(served: Served) -> None:
    served.server.rules = dataclasses.replace(served.server.rules, connections_max=0)
    with contextlib.suppress(ConnectionError):
        assert await served.say(GET % b"/whole") == b""


async def test_tls(served: Served, tls: ssl.SSLContext) -> None:
    listener = sockets.listen("127.0.0.1", 0, setting="test")
    port = listener.getsockname()[1]
    await served.server.start(listener, tls)
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    receiving, sending = await asyncio.open_connection("127.0.0.1", port, ssl=trusting)
    sending.write(GET % b"/whole")
    assert statuses(await heard(receiving, b"whole")) == [200]
    sending.write(b"GET / HTTP/9.9\r\n\r\n")
    async with asyncio.timeout(5):
        assert statuses(await receiving.read(-1)) == [505]
    sending.close()
