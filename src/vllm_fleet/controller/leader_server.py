"""One of several controllers: stands by, leads when it is elected, stands by again when its term has ended.

The listening socket stays open from start to end; who stands by and who leads accept on copies of it, so that between
the two a connection waits for a moment instead of being refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TypeVar

from vllm_fleet.controller import engine
from vllm_fleet.controller.api import Health
from vllm_fleet.controller.exchange import answer_json, refusal
from vllm_fleet.controller.guard import Guard
from vllm_fleet.controller.http import http_server
from vllm_fleet.controller.leader import Leadership, Term
from vllm_fleet.controller.leader_etcd import EtcdElection
from vllm_fleet.controller.server import STOP_S, SWEEP_S
from vllm_fleet.controller.serving import serve_engine
from vllm_fleet.controller.settings import ControllerSettings
from vllm_fleet.controller.state import FleetState
from vllm_fleet.controller.stores.contract import Store, StoreFailed, StoreLost
from vllm_fleet.controller.stores.etcd import EtcdStore
from vllm_fleet.controller.stores.etcd_client import EtcdClient
from vllm_fleet.core import limits
from vllm_fleet.core.env import Env
from vllm_fleet.core.errors import Busy, ConfigError, Corrupt
from vllm_fleet.net.http.messages import Answer, Handled, Request

HEALTH = "/health"

Result = TypeVar("Result")


class Standby:
    """What a controller that does not lead answers. See exchange.Service."""

    def __init__(self, leadership: Leadership, bearer: str, own_host: str, env: Env) -> None:
        self._leadership = leadership
        self._guard = Guard(bearer, own_host, [HEALTH], env)

    def refuse(self, request: Request) -> Answer | None:
        return self._guard.refuse(request)

    def handle(self, request: Request) -> Handled:
        if request.path == HEALTH and request.method == "GET":
            return answer_json(Health("standby", self._leadership.reachable))
        error = self._leadership.refusal()
        return refusal(503, "not_leader", str(error), leader=error.leader)


class Elected:
    """One controller of several, from its start to its stop. ``listener`` listens at ``url`` already."""

    def __init__(
        self,
        settings: ControllerSettings,
        bearer: str,
        listener: socket.socket,
        url: str,
        stop: asyncio.Event,
        env: Env,
    ) -> None:
        assert settings.etcd is not None
        self._settings, self._etcd, self._bearer = settings, settings.etcd, bearer
        self._listener, self._stop, self._env = listener, stop, env
        self._election = EtcdElection(settings.etcd, settings.fleet, url, env.new_id())
        self._leadership = Leadership(self._election, env)

    async def serve(self, started: Callable[[], None]) -> None:
        """Run until ``stop``; ``started`` is told when it answers for the first time.

        Raises:
            ConfigError: no etcd answers at the start, or the journal there is not this fleet's.
        """
        try:
            await self._check_etcd()
            while not self._stop.is_set():
                term = await self._stand_by(started)
                started = _nothing
                if term is not None:
                    await self._lead(term)
        finally:
            self._election.close()

    async def _check_etcd(self) -> None:
        """A wrong endpoint or password is told at once, instead of standing by for ever."""
        until = self._env.now() + limits.ETCD_START_S
        while True:
            try:
                self._leadership.leader = await asyncio.to_thread(self._election.leader)
                return
            except (Busy, Corrupt) as error:
                if self._env.now() >= until:
                    raise ConfigError(f"controller.etcd: {error}") from error
            await asyncio.sleep(limits.ETCD_RETRY_S)

    async def _stand_by(self, started: Callable[[], None]) -> Term | None:
        """Until this controller is elected, or ``stop``."""
        async with self._standing_by():
            started()
            return await self._unless_stopped(self._leadership.gain())

    async def _lead(self, term: Term) -> None:
        """One term, from the journal it begins with to its end."""
        keeping = asyncio.create_task(self._leadership.keep(term))
        store = EtcdStore(EtcdClient(self._etcd), self._etcd.prefix, self._settings.fleet, term)
        try:
            async with self._standing_by():
                state = await self._restored(store, keeping)
            if state is not None:
                running = engine.Engine(state, store, self._env, self._leadership)

                async def over() -> None:
                    await _first(keeping, asyncio.create_task(running.lost.wait()), self._stopping())

                host = self._settings.host
                await serve_engine(running, self._listener.dup(), self._bearer, host, self._env, over)
        finally:
            keeping.cancel()
            await self._leadership.resign(term)
            store.close()
            if keeping.done() and not keeping.cancelled():
                keeping.result()  # raises what went wrong, if something did

    async def _restored(self, store: Store, keeping: asyncio.Task[None]) -> FleetState | None:
        """The fleet as the leader before left it; None when the term, or everything, ends before that is known."""
        rules, fleet = self._settings.rules, self._settings.fleet
        while not keeping.done() and not self._stop.is_set():
            try:
                return await asyncio.to_thread(engine.restore, store, rules, fleet, self._env)
            except StoreFailed:
                await asyncio.sleep(limits.ETCD_RETRY_S)
            except StoreLost:
                return None
        return None

    @contextlib.asynccontextmanager
    async def _standing_by(self) -> AsyncIterator[None]:
        server = http_server(Standby(self._leadership, self._bearer, self._settings.host, self._env))
        await server.start(self._listener.dup())

        async def sweep() -> None:
            while True:
                await asyncio.sleep(SWEEP_S)
                server.sweep(asyncio.get_running_loop().time())

        sweeping = asyncio.create_task(sweep())
        try:
            yield
        finally:
            sweeping.cancel()
            await server.close(STOP_S)

    def _stopping(self) -> asyncio.Task[bool]:
        return asyncio.create_task(self._stop.wait())

    async def _unless_stopped(self, work: Coroutine[None, None, Result]) -> Result | None:
        task, stopping = asyncio.create_task(work), self._stopping()
        await _first(task, stopping)
        return task.result() if task.done() and not task.cancelled() else None


async def _first(*tasks: asyncio.Task[None] | asyncio.Task[bool] | asyncio.Task[Result]) -> None:
    """Wait for one of ``tasks``; the others are cancelled."""
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _nothing() -> None:
    pass
