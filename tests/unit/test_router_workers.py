"""Several processes of one router: what is decided without them, what they tell each other, and a real pair of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.unit.mock_instance import TOKEN, MockInstance, serving
from tests.unit.test_router_main import settings_file
from vllm_fleet.config.connector import bearer
from vllm_fleet.core import limits
from vllm_fleet.core.errors import ConfigError
from vllm_fleet.net import sockets
from vllm_fleet.router.pages import Health
from vllm_fleet.router.parent import Backoff, Watched
from vllm_fleet.router.samples import merged
from vllm_fleet.router.settings import read_settings, with_workers
from vllm_fleet.router.siblings import Siblings, WorkerDoor, ask_health
from vllm_fleet.router.worker import Worker, check_folder
from vllm_fleet.wire.control import Member, Snapshot, encode

PAGE = b"""# HELP a_total Things
# TYPE a_total counter
a_total{x="1 2"} %d.0
a_created{x="1 2"} %d.5
# HELP vllm_fleet_router_instances Known instances
# TYPE vllm_fleet_router_instances gauge
vllm_fleet_router_instances{role="both"} %d.0
"""


def test_pages_become_one() -> None:
    other = (PAGE % (2, 5, 3)).replace(b'x="1 2"} 2.0', b'x="1 2"} 2.0\na_total{x="3"} 7.0')
    text = merged([PAGE % (1, 9, 3), other])
    assert text.decode().splitlines() == [
        "# HELP a_total Things",
        "# TYPE a_total counter",
        'a_total{x="1 2"} 3.0',
        'a_created{x="1 2"} 5.5',
        'a_total{x="3"} 7.0',
        "# HELP vllm_fleet_router_instances Known instances",
        "# TYPE vllm_fleet_router_instances gauge",
        'vllm_fleet_router_instances{role="both"} 3.0',
    ]
    assert merged([b"anything"]) == b"anything"


def test_who_dies_again_and_again_waits_longer() -> None:
    backoff = Backoff()
    pauses = [backoff.pause_s(0.1) for _ in range(12)]
    assert pauses[:3] == [limits.WORKER_BACKOFF_S * factor for factor in (1, 2, 4)]
    assert pauses[-1] == limits.WORKER_BACKOFF_MAX_S
    assert backoff.pause_s(limits.WORKER_STEADY_S) == limits.WORKER_BACKOFF_S


def test_who_does_not_answer_is_hung() -> None:
    watched = Watched(100.0)
    assert not watched.hung(100.0 + limits.WORKER_START_S)
    assert watched.hung(100.1 + limits.WORKER_START_S)
    watched.answered = 200.0
    assert not watched.hung(200.0 + limits.WORKER_HUNG_S)
    assert watched.hung(200.1 + limits.WORKER_HUNG_S)


def test_how_many(tmp_path: Path) -> None:
    settings = read_settings(settings_file(tmp_path, workers=3))
    assert (settings.workers, with_workers(settings, 5).workers) == (3, 5)
    for wrong in (0, -1, limits.ROUTER_WORKERS_MAX + 1):
        with pytest.raises(ConfigError, match="workers"):
            with_workers(settings, wrong)
        with pytest.raises(ConfigError, match="workers"):
            read_settings(settings_file(tmp_path, workers=wrong))


def test_a_folder_for_sockets_has_a_short_name() -> None:
    check_folder(Path("/tmp/x"))
    with pytest.raises(ConfigError, match="too long"):
        check_folder(Path("/" + "x" * limits.SOCKET_PATH_LEN_MAX))


# What they tell each other -------------------------------------------------------------------------------------------


class Told:
    """The pages of another worker."""

    def __init__(self, can_answer: bool = True) -> None:
        self.can_answer = can_answer

    def health(self) -> Health:
        return Health(self.can_answer, {"status": "ok" if self.can_answer else "unavailable", "decode": 1})

    def metrics(self) -> bytes:
        return PAGE % (2, 5, 3)

    def timeline(self, request_id: str) -> bytes | None:
        return b'{"id":"a/b c"}' if request_id == "a/b c" else None


async def door(folder: Path, index: int, told: Told) -> WorkerDoor:
    made = WorkerDoor(told)  # type: ignore[arg-type]
    await made.start(sockets.listen_unix(Worker(index, 3, folder).own_socket, 8))
    return made


async def test_one_answers_for_all(tmp_path: Path) -> None:
    siblings = Siblings(Worker(0, 3, tmp_path).other_sockets)
    one, own = await door(tmp_path, 1, Told()), Health(True, {"status": "ok", "decode": 1})
    alone = await siblings.health(own)
    assert (alone.can_answer, alone.facts["status"]) == (True, "degraded")
    assert (alone.facts["workers"], alone.facts["workers_answering"]) == (3, 2)
    two = await door(tmp_path, 2, Told(can_answer=False))
    assert (await siblings.health(own)).facts["status"] == "degraded"
    helped = await siblings.health(Health(False, {"status": "unavailable"}))
    assert helped.can_answer, "another worker can"
    await two.close()
    two = await door(tmp_path, 2, Told())
    assert (await siblings.health(own)).facts == {
        "status": "ok", "decode": 1, "workers": 3, "workers_answering": 3
    }  # fmt: skip
    assert b'a_total{x="1 2"} 5.0' in await siblings.metrics(PAGE % (1, 9, 3))
    assert await siblings.timeline("a/b c") == b'{"id":"a/b c"}'
    assert await siblings.timeline("none") is None
    assert await ask_health(Worker(1, 3, tmp_path).own_socket)
    for each in (one, two):
        await each.close()
    assert not await ask_health(Worker(1, 3, tmp_path).own_socket)
    await siblings.close()


async def test_only_this_user_may_ask(tmp_path: Path) -> None:
    one = await door(tmp_path, 1, Told())
    assert os.stat(Worker(1, 3, tmp_path).own_socket).st_mode & 0o177 == 0
    await one.close()


# Processes -----------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def controller(*members: Member) -> AsyncIterator[str]:
    """A controller that knows these members; its URL."""

    async def watch(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"content-type": "application/x-ndjson"})
        await answer.prepare(request)
        await answer.write(encode(Snapshot("c", 1, members)) + b"\n")
        await asyncio.Event().wait()
        return answer

    app = web.Application()
    app.router.add_get("/v1/watch", watch)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    with sockets.listen("127.0.0.1", 0, setting="test") as listener:
        await web.SockSite(runner, listener).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        await runner.cleanup()


class Started:
    """A router with workers, and what its processes say."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self.url = ""

    async def until(self, event: str, times: int = 1) -> None:
        """Read until so many lines tell of ``event``."""
        assert self.process.stderr is not None
        async with asyncio.timeout(15):
            while sum(f" {event} " in line for line in self.lines) < times:
                line = (await self.process.stderr.readline()).decode()
                assert line, self.lines
                self.lines.append(line)
        if event == "router.start":
            self.url = json.loads(self.lines[-1].partition("url=")[2].partition(" ")[0])

    async def health(self) -> tuple[int, Any]:
        """Over a connection of its own, so that any worker may get it."""
        return await ask(f"{self.url}/health")


@contextlib.asynccontextmanager
async def started(file: Path, *words: str) -> AsyncIterator[Started]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vllm_fleet.router", "--settings", str(file), *words), stderr=asyncio.subprocess.PIPE
    )
    try:
        yield Started(process)
    finally:
        if process.returncode is None:
            process.terminate()
        await asyncio.wait_for(process.communicate(), 10)  # also of one that was killed: its pipe is open


async def ask(url: str, **headers: str) -> tuple[int, Any]:
    """Over a connection of its own, so that any worker may get it."""
    async with aiohttp.ClientSession() as http, http.get(url, headers=headers) as answer:
        text = await answer.text()
        return answer.status, json.loads(text) if text.startswith("{") else text


async def until(done: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(10):
        while not await done():  # noqa: ASYNC110 - a process has no event to offer
            await asyncio.sleep(0.02)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def left(folder: Path) -> list[Path]:
    return list(folder.glob("w-*"))


async def test_workers_share_a_port_and_what_they_know(tmp_path: Path) -> None:
    instance = MockInstance("d", "decode")
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(serving(instance))
        watched = await stack.enter_async_context(controller(instance.member()))
        router = await stack.enter_async_context(started(settings_file(tmp_path, controller=watched), "--workers", "2"))
        await router.until("router.start")
        pids = children(router.process.pid)
        assert len(pids) == 2

        async def ready() -> bool:
            return await router.health() == (200, {"status": "ok", "prefill": 0, "decode": 1, "both": 0,
                                                   "workers": 2, "workers_answering": 2})  # fmt: skip

        await until(ready)
        for number in range(16):
            async with aiohttp.ClientSession() as http:
                asked = http.post(
                    f"{router.url}/v1/completions", json={"prompt": "hi"}, headers={"x-request-id": f"r-{number}"}
                )
                async with asked as answer:
                    assert answer.status == 200
        for _ in range(4):
            _, page = await ask(f"{router.url}/metrics")
            assert 'vllm_fleet_router_requests_total{route="/v1/completions",status="200"} 16.0' in page
            assert 'vllm_fleet_router_instances{role="decode",state="ready"} 1.0' in page
            for number in (0, 15):
                status, timeline = await ask(
                    f"{router.url}/fleet/v1/requests/r-{number}", authorization=f"Bearer {bearer(TOKEN)}"
                )
                assert (status, timeline["id"]) == (200, f"r-{number}")

        os.kill(pids[0], signal.SIGKILL)
        await router.until("worker.exit")
        await router.until("worker.start", times=3)
        await until(ready)
        assert len(children(router.process.pid)) == 2
        assert pids[0] not in children(router.process.pid)

        pids = children(router.process.pid)
        router.process.terminate()
        _, rest = await router.process.communicate()
        assert router.process.returncode == 0
        assert b"Traceback" not in rest
        assert not any(map(alive, pids))
    assert not left(tmp_path), "nothing is left behind"


async def test_workers_do_not_outlive_their_parent(tmp_path: Path) -> None:
    async with controller() as watched, started(settings_file(tmp_path, controller=watched, workers=2)) as router:
        await router.until("router.start")
        pids = children(router.process.pid)
        router.process.kill()

        async def gone() -> bool:
            return not any(map(alive, pids))

        await until(gone)


async def test_a_port_that_another_has_is_not_shared(tmp_path: Path) -> None:
    with sockets.listen("127.0.0.1", 0, setting="test", shared=True) as other:
        port = other.getsockname()[1]
        async with started(settings_file(tmp_path, port=port, workers=2)) as router:
            _, said = await router.process.communicate()
    assert (router.process.returncode, said.count(b"\n")) == (2, 1)
    assert b"is taken" in said


async def test_settings_that_no_worker_can_use_end_the_router(tmp_path: Path) -> None:
    async with started(settings_file(tmp_path, token_file=str(tmp_path / "none"), workers=2)) as router:
        _, said = await asyncio.wait_for(router.process.communicate(), 15)
    assert router.process.returncode == 2
    assert b"none" in said
    assert b"worker.exit" not in said
