"""All parts of one router, put together."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from vllm_fleet.config.connector import bearer
from vllm_fleet.core import limits, log
from vllm_fleet.core.env import Env
from vllm_fleet.router.audit import Audit, run_audit
from vllm_fleet.router.choosing import Choosing
from vllm_fleet.router.doors import Doors
from vllm_fleet.router.exchange import Exchange
from vllm_fleet.router.fleet_view import FleetView
from vllm_fleet.router.front import Front
from vllm_fleet.router.http import Server
from vllm_fleet.router.metrics import Metrics
from vllm_fleet.router.minting import minting
from vllm_fleet.router.models import Models
from vllm_fleet.router.observer import Observer
from vllm_fleet.router.policies.settings import PolicySettings
from vllm_fleet.router.request_rules import RequestRules
from vllm_fleet.router.upstream import Upstream
from vllm_fleet.router.worker import Worker
from vllm_fleet.wire.control import News

OnEvent = Callable[[News], None]
Watch = Callable[[OnEvent], Awaitable[None]]
"""Calls back with what happens to the fleet until it is cancelled."""


@dataclass(frozen=True, slots=True)
class Router:
    """A running router."""

    url: str
    exchange: Exchange
    metrics: Metrics
    front: Front
    admin_url: str
    """Where metrics and timelines are."""


@contextlib.asynccontextmanager
async def running(
    listener: socket.socket,
    watch: Watch,
    env: Env,
    request_timeout_s: float,
    token: bytes,
    *,
    streamed: bool = True,
    policy: PolicySettings = PolicySettings(),  # noqa: B008  a constant
    rules: RequestRules = RequestRules(),  # noqa: B008  a constant
    stop_s: float = limits.ROUTER_STOP_S,
    front: Front | None = None,
    admin: socket.socket | None = None,
    worker: Worker | None = None,
) -> AsyncIterator[Router]:
    """A router that serves on ``listener`` inside the block; leaving it stops it, politely for ``stop_s``.

    ``token`` is the fleet's: it signs tickets, and what is derived from it opens timelines. ``admin``: where metrics
    and timelines are served; None: on ``listener``. The caller closes ``front`` afterwards.
    """
    if front is None:
        front = Front(Observer(env))
    view, audit = FleetView(), Audit()
    metrics = Metrics(view, audit, front.observer.meters)
    choosing = Choosing(policy, view, env)
    metrics.meters.policies = {"prefill": choosing.prefill.name, "decode": choosing.decode.name}
    metrics.show(choosing)
    doors = Doors(listener, admin, front.tls, worker)
    async with Upstream() as upstream:
        exchange = Exchange(
            view,
            upstream,
            audit,
            metrics,
            env,
            prefill_policy=choosing.prefill,
            decode_policy=choosing.decode,
            mint=minting(token, env) if streamed else None,
            loads=choosing.loads,
            skipping=choosing.skipping,
            rules=rules,
        )
        models, secret, here = Models(view, upstream, env), bearer(token), doors.operators_here
        facts = (view, exchange, models, metrics, env, request_timeout_s, secret, doors.siblings)
        server = Server(*facts, front=front, operators_here=here)
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(_watch(watch, exchange.apply)),
                group.create_task(run_audit(audit, view, upstream, env)),
                *choosing.start(group, upstream),
                group.create_task(front.refresher.run()),
            ]
            await doors.open(server, env)
            try:
                yield Router(doors.url, exchange, metrics, front, doors.admin_url)
            finally:
                log.event("router.stop", running=exchange.live)
                await doors.close(server, stop_s)
                await exchange.close()
                for task in tasks:
                    task.cancel()


async def _watch(watch: Watch, on_event: OnEvent) -> None:
    await watch(on_event)
