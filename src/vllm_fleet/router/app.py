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
from vllm_fleet.router.exchange import Exchange
from vllm_fleet.router.fleet_view import FleetView
from vllm_fleet.router.http import Server
from vllm_fleet.router.metrics import Metrics
from vllm_fleet.router.minting import minting
from vllm_fleet.router.models import Models
from vllm_fleet.router.policies.least_load import LeastLoad
from vllm_fleet.router.upstream import Upstream
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


@contextlib.asynccontextmanager
async def running(
    listener: socket.socket,
    watch: Watch,
    env: Env,
    request_timeout_s: float,
    token: bytes,
    *,
    streamed: bool = True,
    stop_s: float = limits.ROUTER_STOP_S,
) -> AsyncIterator[Router]:
    """A router that serves on ``listener`` inside the block; leaving it stops it, politely for ``stop_s``.

    ``token`` is the fleet's: it signs tickets, and what is derived from it opens timelines.
    """
    view, audit = FleetView(), Audit()
    metrics = Metrics(view, audit)
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    async with Upstream() as upstream:
        exchange = Exchange(
            view,
            upstream,
            audit,
            metrics,
            env,
            prefill_policy=LeastLoad(),
            decode_policy=LeastLoad(),
            mint=minting(token, env) if streamed else None,
        )
        server = Server(view, exchange, Models(view, upstream, env), metrics, env, request_timeout_s, bearer(token))
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(_watch(watch, exchange.apply)),
                group.create_task(run_audit(audit, view, upstream, env)),
            ]
            await server.start(listener)
            log.event("router.start", url=url)
            try:
                yield Router(url, exchange, metrics)
            finally:
                log.event("router.stop", running=exchange.live)
                await server.stop(stop_s)
                await exchange.close()
                for task in tasks:
                    task.cancel()


async def _watch(watch: Watch, on_event: OnEvent) -> None:
    await watch(on_event)
