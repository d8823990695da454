"""The controller's HTTP, its blocking client and its watcher, over real loopback sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from vllm_fleet.config.connector import bearer
from vllm_fleet.controller import __main__ as process
from vllm_fleet.controller.settings import ControllerSettings, read_settings
from vllm_fleet.controller.stores.contract import StoreFailed
from vllm_fleet.controller.stores.embedded import EmbeddedStore
from vllm_fleet.core import limits
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.env import RealEnv
from vllm_fleet.core.errors import BadRequest, Busy, ConfigError, Fenced, NotRegistered, PeerGone
from vllm_fleet.net.control_client import ControlClient
from vllm_fleet.net.http.connection import Connection
from vllm_fleet.net.watch import watch
from vllm_fleet.wire import control
from vllm_fleet.wire.control import Change, Heartbeat, News, Register, Registered, ReportedState, Snapshot

TOKEN = bytes(range(32))
BEARER = bearer(TOKEN)
AUTHORISED = {"Authorization": f"Bearer {BEARER}"}


def hello(name: str = "a", life: str = "life-1", state: ReportedState = "starting", port: int = 1) -> Register:
    return Register(name, "both", f"http://127.0.0.1:{port}", 7, life, state)


def soon() -> Deadline:
    return Deadline.after(5.0, "test")


@dataclass
class Running:
    """One controller on a free port; ``call`` runs a blocking client call in a thread."""

    settings: ControllerSettings
    url: str
    client: ControlClient
    stop: asyncio.Event
    task: asyncio.Task[None]

    async def join(self, request: Register | None = None) -> Registered:
        return await asyncio.to_thread(self.client.register, hello() if request is None else request, soon())

    async def beat(self, generation: int, state: ReportedState = "ready", name: str = "a") -> control.HeartbeatAck:
        return await asyncio.to_thread(self.client.heartbeat, name, Heartbeat(generation, state), soon())

    async def end(self) -> None:
        self.stop.set()
        async with asyncio.timeout(2.0):
            await self.task


Start = Callable[..., Awaitable[Running]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN.hex())
    token_file.chmod(0o600)
    running: list[Running] = []

    async def run(port: int = 0, suspect_s: float = 30.0, lease_s: float = 60.0) -> Running:
        settings = ControllerSettings(
            "test", str(token_file), str(tmp_path / "state"), port=port, suspect_s=suspect_s, lease_s=lease_s
        )
        stop = asyncio.Event()
        url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(process.serve(settings, stop, url.set_result, RealEnv()))
        await until(lambda: task.done() or url.done())
        if task.done():
            await task
        one = Running(settings, await url, ControlClient(await url, BEARER), stop, task)
        running.append(one)
        return one

    yield run
    for one in running:
        await one.end()


@pytest.fixture
async def controller(start: Start) -> Running:
    return await start()


async def asked(
    method: str, url: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, bytes]:
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, url, data=body, headers=AUTHORISED if headers is None else headers) as response,
    ):
        return response.status, await response.read()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another task brings about."""
    async with asyncio.timeout(10.0):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event to offer
            await asyncio.sleep(0.01)


# Membership --------------------------------------------------------------------------------------------------------


async def test_a_life_from_registration_to_leaving(controller: Running) -> None:
    first = await controller.join()
    assert first == Registered(1, 1, 0.5, 60.0)
    assert await controller.join() == first
    assert await controller.beat(1) == control.HeartbeatAck(2)
    snapshot = await asyncio.to_thread(controller.client.snapshot, soon())
    assert [(member.name, member.state, member.generation) for member in snapshot.members] == [("a", "ready", 1)]
    for _ in range(2):
        await asyncio.to_thread(controller.client.deregister, "a", 1, soon())
    assert (await asyncio.to_thread(controller.client.snapshot, soon())).members == ()
    with pytest.raises(NotRegistered, match="register again"):
        await controller.beat(1)


async def test_an_old_generation_is_fenced_and_changes_nothing(controller: Running) -> None:
    await controller.join()
    assert (await controller.join(hello(life="life-2"))).generation == 2
    before = await asyncio.to_thread(controller.client.snapshot, soon())
    with pytest.raises(Fenced, match="held by generation 2"):
        await controller.beat(1)
    with pytest.raises(Fenced):
        await asyncio.to_thread(controller.client.deregister, "a", 1, soon())
    with pytest.raises(Fenced, match="replaced"):
        await controller.join()
    assert await asyncio.to_thread(controller.client.snapshot, soon()) == before


async def test_silent_member_is_suspect_then_gone(start: Start) -> None:
    controller = await start(suspect_s=0.6, lease_s=0.9)
    await controller.join(hello(state="ready"))
    seen: list[str] = []
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(5.0), stream(controller) as events:
            async for event in events:
                if isinstance(event, Change):
                    seen.append(event.member.state)
                if seen[-1:] == ["gone"]:
                    break
    assert seen == ["suspect", "gone"]


# Strangers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": f"Bearer {BEARER[:-1]}0"},
        {"Authorization": f"bearer {BEARER}"},
        {"Authorization": BEARER},
        {"Authorization": "Bearer \u00e9"},
    ],
)
@pytest.mark.parametrize("path", ["/v1/members", "/v1/watch", "/nowhere"])
async def test_without_the_token_everything_is_refused_alike(
    controller: Running, headers: dict[str, str], path: str
) -> None:
    status, body = await asked("GET", controller.url + path, headers=headers)
    assert (status, control.decode_error(body).code) == (401, "unauthorized")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:80", 200),
        ("localhost:8000", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
        ("user@evil.example", 403),
        ("[::1", 403),
        ("", 403),
    ],
)
async def test_host_must_be_an_address(controller: Running, host: str, status: int) -> None:
    for path in ("/v1/members", "/health"):
        got, _ = await asked("GET", controller.url + path, headers={**AUTHORISED, "Host": host})
        assert got == status


async def test_web_pages_are_refused(controller: Running) -> None:
    url = controller.url + "/v1/members/a?generation=1"
    for origin in ("http://evil.example", "null", "http://127.0.0.1"):
        status, body = await asked("DELETE", url, headers={**AUTHORISED, "Origin": origin})
        assert (status, control.decode_error(body).code) == (403, "origin")


async def test_health_needs_no_token(controller: Running) -> None:
    status, body = await asked("GET", controller.url + "/health", headers={})
    assert (status, json.loads(body)) == (200, {"status": "ok", "durable": True})


# Wrong requests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/nowhere", b"", 404, "not_found"),
        ("PUT", "/v1/members", b"{}", 405, "method_not_allowed"),
        ("POST", "/v1/members", b"", 400, "bad_request"),
        ("POST", "/v1/members", b"{}", 400, "bad_request"),
        ("POST", "/v1/members", b'{"name":"\xff"}', 400, "bad_request"),
        ("POST", "/v1/members", b'{"x":' + b"[" * 60_000, 400, "bad_request"),
        ("POST", "/v1/members", b" " * (limits.CONTROL_BODY_BYTES_MAX + 1), 413, "too_large"),
        ("POST", "/v1/members/a/heartbeat", b'{"generation":-1,"state":"ready"}', 400, "bad_request"),
        ("POST", "/v1/members/a/heartbeat", b'{"generation":1,"state":"gone"}', 400, "bad_request"),
        ("POST", "/v1/members/a/heartbeat", b'{"generation":1,"state":"ready"}', 404, "unknown"),
        ("DELETE", "/v1/members/a", b"", 400, "bad_request"),
        ("DELETE", "/v1/members/a?generation=-1", b"", 400, "bad_request"),
        ("DELETE", "/v1/members/a?generation=99999999999999999999", b"", 400, "bad_request"),
        ("GET", "/v1/watch?since=x", b"", 400, "bad_request"),
    ],
)
async def test_wrong_requests_get_a_typed_answer(
    controller: Running, method: str, path: str, body: bytes, status: int, code: str
) -> None:
    got, answer = await asked(method, controller.url + path, body)
    assert (got, control.decode_error(answer).code) == (status, code)


async def test_a_fingerprint_has_a_limit(controller: Running) -> None:
    long = Register("a", "both", "http://h", 1, "l", "ready", {str(n): "x" * 200 for n in range(30)})
    with pytest.raises(BadRequest, match="fingerprint is"):
        await controller.join(long)


async def test_a_bug_is_a_typed_500_and_not_the_end(controller: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr("vllm_fleet.controller.reactor.on_register", lambda *_: 1 / 0)
        status, body = await asked("POST", controller.url + "/v1/members", control.encode(hello()))
        assert (status, control.decode_error(body).code) == (500, "bug")
        with pytest.raises(PeerGone, match="500 bug"):
            await controller.join()
    assert (await controller.join()).generation == 1


# The disk ----------------------------------------------------------------------------------------------------------


async def test_full_disk_stops_joins_only_and_heals(controller: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise StoreFailed("no space left on device")

    await controller.join()
    async with stream(controller) as events:
        before = await anext(events)
        with monkeypatch.context() as disk:
            disk.setattr(EmbeddedStore, "append", full)
            disk.setattr(EmbeddedStore, "rewrite", full)
            with pytest.raises(Busy, match="joins wait"):
                await controller.join(hello("b", "life-b", port=2))
            assert (await controller.beat(1)).revision == 2
            status, body = await asked("GET", controller.url + "/health")
            assert (status, json.loads(body)) == (200, {"status": "not_durable", "durable": False})
            told = await anext(events)
            assert isinstance(told, Snapshot)
            assert isinstance(before, Snapshot)
            assert told.controller != before.controller
        monkeypatch.setattr(limits, "JOURNAL_RETRY_S", 0.05)
        controller_joined = None
        while controller_joined is None:  # bounded by the test's own time limit
            with contextlib.suppress(Busy):
                controller_joined = await controller.join(hello("b", "life-b", port=2))
            await asyncio.sleep(0.05)
        assert controller_joined.generation == 2


async def test_journal_is_compacted(controller: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "JOURNAL_BYTES_MAX", 1000)
    for number in range(30):
        await controller.join(hello(life=f"life-{number}"))
    assert (Path(controller.settings.state_dir) / "journal").stat().st_size < 4000


async def test_restart_keeps_members_generations_and_watchers(start: Start) -> None:
    first = await start()
    await first.join()
    await first.beat(1)
    before = await asyncio.to_thread(first.client.snapshot, soon())
    await first.end()
    second = await start()
    assert await asyncio.to_thread(second.client.snapshot, soon()) == before
    async with stream(second, f"?since=1&controller={before.controller}") as events:
        resumed = await anext(events)
        assert isinstance(resumed, Change)
        assert resumed.revision == 2
    async with stream(second, "?since=1&controller=another") as events:
        assert await anext(events) == before
    assert await second.beat(1) == control.HeartbeatAck(2)
    assert (await second.join(hello(life="life-2"))).generation == 2


# Watching ----------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def stream(controller: Running, query: str = "") -> AsyncIterator[AsyncIterator[control.WatchEvent]]:
    async with (
        aiohttp.ClientSession(headers=AUTHORISED) as session,
        session.get(f"{controller.url}/v1/watch{query}") as response,
    ):
        assert response.status == 200, await response.text()
        assert response.content_type == "application/x-ndjson"

        async def events() -> AsyncIterator[control.WatchEvent]:
            async for line in response.content:
                yield control.decode_watch_event(line)

        yield events()


async def test_stream_begins_with_a_snapshot_then_tells_changes_then_that_it_lives(controller: Running) -> None:
    await controller.join()
    async with stream(controller) as events:
        snapshot = await anext(events)
        assert isinstance(snapshot, Snapshot)
        assert [member.name for member in snapshot.members] == ["a"]
        await controller.beat(1)
        change = await anext(events)
        assert isinstance(change, Change)
        assert (change.revision, change.member.state) == (2, "ready")
        async with asyncio.timeout(2.0):
            assert await anext(events) == control.StillHere(2)


async def test_stream_resumes_after_a_revision_or_gives_a_snapshot(controller: Running) -> None:
    for life in ("1", "2", "3"):
        await controller.join(hello(life=life))
    async with stream(controller, "?since=1") as events:
        resumed = [await anext(events), await anext(events)]
        assert [event.revision for event in resumed] == [2, 3]
    async with stream(controller, "?since=3") as events:
        assert await anext(events) == control.StillHere(3)
    async with stream(controller, "?since=99") as events:
        assert isinstance(await anext(events), Snapshot)


async def test_watchers_are_limited(controller: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "WATCHERS_MAX", 1)
    async with stream(controller) as events:
        await anext(events)
        status, body = await asked("GET", controller.url + "/v1/watch")
        assert (status, control.decode_error(body).code) == (503, "busy")
    async with asyncio.timeout(3.0):
        while (await connected_status(controller)) != 200:  # noqa: ASYNC110 - the place is free once the server notices
            await asyncio.sleep(0.05)


async def connected_status(controller: Running) -> int:
    async with (
        aiohttp.ClientSession(headers=AUTHORISED) as session,
        session.get(f"{controller.url}/v1/watch") as response,
    ):
        return response.status


async def test_watcher_that_does_not_keep_up_is_cut_off(controller: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "WATCH_QUEUE_MAX", 1)
    written = Connection.write
    monkeypatch.setattr(Connection, "write", lambda *given: written(*given) and False)  # it is behind, and stays so
    async with stream(controller) as events:
        await anext(events)
        for life in ("1", "2", "3"):
            await controller.join(hello(life=life))
        with pytest.raises((aiohttp.ClientError, StopAsyncIteration)):
            async with asyncio.timeout(5.0):
                await anext(events)


async def test_stopping_ends_watch_streams_at_once(controller: Running) -> None:
    async with stream(controller) as events:
        await anext(events)
        began = asyncio.get_running_loop().time()
        await controller.end()
        with pytest.raises(StopAsyncIteration):
            await anext(events)
        assert asyncio.get_running_loop().time() - began < 1.0


async def test_watch_survives_a_restart_and_resumes(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    first = await start()
    port = int(first.url.rsplit(":", 1)[1])
    events: list[News] = []
    with caplog.at_level(logging.INFO, logger="vllm_fleet"):
        following = asyncio.create_task(watch(first.url, BEARER, events.append))
        await until(lambda: len(events) == 1)
        await first.join()
        await until(lambda: len(events) == 2)
        await first.end()
        await until(lambda: "controller.unreachable" in caplog.text)
        await asyncio.sleep(0.5)
        second = await start(port=port)
        await second.beat(1)
        await until(lambda: len(events) == 3)
    kinds = [(type(event).__name__, event.revision) for event in events]
    assert kinds == [("Snapshot", 0), ("Change", 1), ("Change", 2)]
    logged = [record.getMessage().split()[0] for record in caplog.records]
    assert logged.count("controller.unreachable") == 1, "once per outage"
    assert logged.count("controller.reachable") == 1
    following.cancel()
    with pytest.raises(asyncio.CancelledError):
        await following


async def test_client_is_told_when_the_token_is_wrong(controller: Running) -> None:
    with pytest.raises(BadRequest, match="401 unauthorized"):
        await asyncio.to_thread(ControlClient(controller.url, "0" * 64).snapshot, soon())


# The process -------------------------------------------------------------------------------------------------------


def test_settings_are_strict(tmp_path: Path) -> None:
    file = tmp_path / "controller.json"
    good: dict[str, object] = {"fleet": "f", "token_file": "t", "state_dir": "s"}
    file.write_text(json.dumps(good))
    assert read_settings(file) == ControllerSettings("f", "t", "s")
    bad: list[tuple[dict[str, object], str]] = [
        ({"typo": 1}, "unknown field"),
        ({"port": -1}, "port"),
        ({"suspect_s": 20.0}, "must be smaller"),
        ({"heartbeat_s": 0}, "heartbeat_s"),
    ]
    for wrong, message in bad:
        file.write_text(json.dumps({**good, **wrong}))
        with pytest.raises(ConfigError, match=message):
            read_settings(file)
    with pytest.raises(ConfigError, match="cannot read"):
        read_settings(tmp_path / "absent.json")


async def test_process_starts_answers_and_ends_within_a_second(tmp_path: Path) -> None:
    token_file, file = tmp_path / "token", tmp_path / "controller.json"
    token_file.write_text(TOKEN.hex())
    token_file.chmod(0o600)
    file.write_text(json.dumps({"fleet": "f", "token_file": str(token_file), "state_dir": str(tmp_path / "state")}))
    child = await start_process(file)
    assert child.stderr is not None
    line = (await child.stderr.readline()).decode()
    assert "controller.start" in line
    url = line.split('url="', 1)[1].split('"', 1)[0]
    client = ControlClient(url, BEARER)
    assert (await asyncio.to_thread(client.register, hello(), soon())).generation == 1
    second = await start_process(file)
    _, message = await second.communicate()
    assert (second.returncode, message.count(b"\n")) == (2, 1), message
    assert f"process {child.pid}".encode() in message
    child.terminate()
    began = asyncio.get_running_loop().time()
    assert await child.wait() == 0
    assert asyncio.get_running_loop().time() - began < 1.0
    assert b"Traceback" not in await child.stderr.read()


async def start_process(settings_file: Path) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "vllm_fleet.controller", "--settings", str(settings_file), stderr=asyncio.subprocess.PIPE
    )  # fmt: skip
