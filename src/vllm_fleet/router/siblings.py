"""The other workers of one router: what operators ask one of them for is answered for all of them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from urllib.parse import quote, unquote

import msgspec

from vllm_fleet.core import limits
from vllm_fleet.core.errors import BadRequest, Corrupt, PeerGone
from vllm_fleet.net import sockets
from vllm_fleet.net.http.client import Pool
from vllm_fleet.net.http.messages import Answer, Request, Rules
from vllm_fleet.net.http.server import HttpServer
from vllm_fleet.router.pages import METRICS_TYPE, Health, Pages
from vllm_fleet.router.samples import merged
from vllm_fleet.router.worker import Worker

_HEALTH, _METRICS, _TIMELINES = "/health", "/metrics", "/requests/"

_decode_facts = msgspec.json.Decoder(dict[str, object]).decode


class Siblings:
    """Asks the others; one that does not answer in time is left out, and /health says so."""

    def __init__(self, paths: Sequence[str]) -> None:
        """``paths``: of the others' unix sockets."""
        self._urls = [f"unix:{path}:" for path in paths]
        self._pool: Pool | None = None

    async def health(self, own: Health) -> Health:
        """All workers together: degraded where one is away or cannot answer, unavailable where none can."""
        answers = await self._ask_all(_HEALTH)
        told_us = [answer for answer in answers if answer is not None]
        found = [own, *(Health(status == 200, _decode_facts(body)) for status, body in told_us)]
        able = [health for health in found if health.can_answer]
        told = own if own.can_answer or not able else able[0]
        facts = {**told.facts, "workers": len(self._urls) + 1, "workers_answering": len(found)}
        if told.can_answer and len(able) < len(self._urls) + 1 and facts.get("status") == "ok":
            facts |= {"status": "degraded", "missing": "a worker: the others answer"}
        return Health(told.can_answer, facts)

    async def metrics(self, own: bytes) -> bytes:
        """The sums of all workers."""
        others = [answer[1] for answer in await self._ask_all(_METRICS) if answer is not None and answer[0] == 200]
        return merged([own, *others])

    async def timeline(self, request_id: str) -> bytes | None:
        """A timeline that another worker has."""
        for answer in await self._ask_all(_TIMELINES + quote(request_id, safe="")):
            if answer is not None and answer[0] == 200:
                return answer[1]
        return None

    async def answers(self) -> bool:
        """Whether all others answer."""
        return all(answer is not None for answer in await self._ask_all(_HEALTH))

    async def close(self) -> None:
        """Close the connections to them."""
        if self._pool is not None:
            await self._pool.close()

    async def _ask_all(self, target: str) -> list[tuple[int, bytes] | None]:
        return await asyncio.gather(*(self._ask(url + target) for url in self._urls))

    async def _ask(self, url: str) -> tuple[int, bytes] | None:
        if self._pool is None:
            self._pool = Pool(connect_s=limits.WORKER_ASK_S, idle_s=limits.POOL_IDLE_S)
        try:
            async with asyncio.timeout(limits.WORKER_ASK_S), self._pool.ask("GET", url, {}, fresh=True) as answer:
                body = await answer.read(limits.METRICS_BODY_BYTES_MAX)
        except (PeerGone, Corrupt, BadRequest, TimeoutError):
            return None
        return None if body is None else (answer.status, body)


async def ask_health(path: str) -> bool:
    """Whether the worker whose unix socket this is answers at all."""
    asking = Siblings([path])
    try:
        return await asking.answers()
    finally:
        await asking.close()


class WorkerDoor:
    """What one worker tells the others, over a unix socket that only its own user may open."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._http = HttpServer(self, _rules(), _explain)

    async def start(self, listener: socket.socket) -> None:
        """Serve on a unix socket."""
        await self._http.start(listener)
        self._http.keep_sweeping()

    async def close(self) -> None:
        """Serve no more."""
        await self._http.close(0.2)

    def refuse(self, request: Request) -> Answer | None:
        """See Service."""
        return None

    def handle(self, request: Request) -> Answer:
        """See Service."""
        if request.path == _HEALTH:
            health = self._pages.health()
            return Answer(200 if health.can_answer else 503, msgspec.json.encode(health.facts))
        if request.path == _METRICS:
            return Answer(200, self._pages.metrics(), METRICS_TYPE)
        found = self._pages.timeline(unquote(request.path.removeprefix(_TIMELINES)))
        return _explain(404, "", "") if found is None else Answer(200, found)


async def open_door(worker: Worker, pages: Pages) -> WorkerDoor:
    """Tell the other workers from now on what they ask."""
    door = WorkerDoor(pages)
    await door.start(sockets.listen_unix(worker.own_socket, limits.ROUTER_WORKERS_MAX))
    return door


def _explain(status: int, code: str, text: str) -> Answer:
    return Answer(status, text.encode(), "text/plain")


def _rules() -> Rules:
    return Rules(
        head_bytes_max=limits.ROUTER_TARGET_BYTES_MAX,
        body_bytes_max=0,
        pipeline_max=1,
        head_s=limits.ROUTER_HEAD_S,
        body_s=limits.ROUTER_HEAD_S,
        idle_s=limits.ROUTER_IDLE_S,
        write_s=limits.ROUTER_HEAD_S,
        linger_s=limits.ROUTER_LINGER_S,
        backlog=limits.ROUTER_WORKERS_MAX,
        connections_max=limits.ROUTER_WORKERS_MAX * 4,
        files_kept=0,
    )
