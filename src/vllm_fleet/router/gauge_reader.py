"""Reads the instances' own gauges every second, at the edge."""

from __future__ import annotations

import asyncio

from vllm_fleet.core import limits
from vllm_fleet.core.env import Env
from vllm_fleet.core.ids import InstanceName
from vllm_fleet.router.fleet_view import FleetView
from vllm_fleet.router.gauges import LoadBook, parse_gauges
from vllm_fleet.router.prefix.book import PrefixBook
from vllm_fleet.router.upstream import Upstream, UpstreamFailure
from vllm_fleet.wire.control import Member


async def run_gauges(loads: LoadBook, book: PrefixBook, view: FleetView, upstream: Upstream, env: Env) -> None:
    """Keep loads and the sizes of caches fresh, until cancelled."""
    while True:
        now = env.now()
        loads.age(now)
        members = view.ready(now)
        for start in range(0, len(members), limits.METRICS_AT_ONCE):
            async with asyncio.TaskGroup() as group:
                for member in members[start : start + limits.METRICS_AT_ONCE]:
                    group.create_task(_read(loads, book, member, upstream, env))
        await asyncio.sleep(limits.GAUGES_POLL_S)


async def _read(loads: LoadBook, book: PrefixBook, member: Member, upstream: Upstream, env: Env) -> None:
    try:
        async with asyncio.timeout(limits.GAUGES_READ_S), upstream.get(f"{member.url}/metrics", {}) as answer:
            page = await answer.read(limits.METRICS_BODY_BYTES_MAX)
            if answer.status != 200:
                return
    except (UpstreamFailure, TimeoutError):
        return  # a request meets the same failure and reports it; meanwhile the old reading ages
    gauges = parse_gauges(page)
    if gauges is None:
        return
    loads.take(member.name, gauges, env.now())
    if gauges.cache_tokens:
        book.resize(InstanceName(member.name), gauges.cache_tokens)
