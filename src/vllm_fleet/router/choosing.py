"""All of one router that decides who gets a request, put together, and the tasks that keep it informed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vllm_fleet.core import limits
from vllm_fleet.core.env import Env
from vllm_fleet.core.ids import InstanceName
from vllm_fleet.router.fleet_view import FleetView
from vllm_fleet.router.gauge_reader import run_gauges
from vllm_fleet.router.gauges import LoadBook
from vllm_fleet.router.policies.making import make
from vllm_fleet.router.policies.settings import PolicySettings
from vllm_fleet.router.policies.skipping import Skipping
from vllm_fleet.router.prefix.book import PrefixBook
from vllm_fleet.router.upstream import Upstream
from vllm_fleet.wire.control import Member


class Choosing(Collector):
    """Policies of prefill and decode, loads, prefixes."""

    def __init__(self, settings: PolicySettings, view: FleetView, env: Env) -> None:
        self._settings, self._view, self._env = settings, view, env
        self.book = PrefixBook(env.new_id()[:16])
        self.loads = LoadBook(view.in_flight)
        self.prefill = make(settings.prefill, settings, self.book, env)
        self.decode = make(settings.decode, settings, self.book, env)
        self.skipping = Skipping(settings.handoff_min_tokens, settings.handoff_cached_share)
        self._lives: dict[str, str] = {}

    def start(self, group: asyncio.TaskGroup, upstream: Upstream) -> list[asyncio.Task[None]]:
        """Begin to read loads and events; the tasks run until they are cancelled."""
        tasks = [
            group.create_task(run_gauges(self.loads, self.book, self._view, upstream, self._env), name="gauges"),
            group.create_task(self._run_forgetting(), name="forgetting"),
        ]
        if self._settings.follows_events:
            # ZeroMQ is loaded only where it is used
            from vllm_fleet.router.prefix.subscriber import run_subscriptions

            work = run_subscriptions(self.book, self._publishers, self._settings.kv_events)
            tasks.append(group.create_task(work, name="kv events"))
        return tasks

    def collect(self) -> Iterator[Metric]:
        """Gauges of what is known of prefixes."""
        p, names = "vllm_fleet_router_prefix", [InstanceName(member.name) for member in self._view.members()]
        blocks = GaugeMetricFamily(f"{p}_blocks", "KV blocks an instance says it holds", labels=["instance"])
        text = GaugeMetricFamily(f"{p}_text_bytes", "Prompts sent and believed to be held", labels=["instance"])
        for name in names:
            if self.book.live(name):
                blocks.add_metric([name], self.book.held_blocks(name))
            text.add_metric([name], self.book.holds(name))
        kept = GaugeMetricFamily(f"{p}_kept_bytes", "Prompts remembered for routing")
        kept.add_metric([], self.book.tree.bytes)
        lost = CounterMetricFamily(f"{p}_blocks_ignored", "Blocks told that have no place here", labels=["why"])
        lost.add_metric(["unknown_parent"], self.book.blocks.orphans)
        lost.add_metric(["full"], self.book.blocks.overflows)
        learnt = CounterMetricFamily(f"{p}_learnt", "Requests whose blocks were found in events")
        learnt.add_metric([], self.book.learnt)
        yield from (blocks, text, kept, lost, learnt)

    def _publishers(self) -> list[Member]:
        return [member for member in self._view.members() if member.state in ("ready", "suspect", "draining")]

    async def _run_forgetting(self) -> None:
        while True:
            self.forget_the_gone()
            await asyncio.sleep(limits.GAUGES_POLL_S)

    def forget_the_gone(self) -> None:
        """Drop what is known of instances that left or were started anew: their caches are empty."""
        now = {member.name: member.incarnation for member in self._view.members()}
        for name, incarnation in self._lives.items():
            if now.get(name) != incarnation:
                for policy in (self.prefill, self.decode):
                    policy.forget(InstanceName(name))
                self.loads.forget(name)
        self._lives = now
