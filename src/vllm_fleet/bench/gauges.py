"""What a fleet holds when nobody asks it anything: blocks, pins, requests, file descriptors, threads."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from vllm_fleet.bench.own_fleet import OwnFleet
from vllm_fleet.bench.plain import post, scrape, total

QUIET_S = 60.0
"""Within so long after the last request everything is given back (docs/promises.md)."""
TURN_S = 0.3
HANDOFFS = ("held", "loaded", "local", "recomputed", "refused", "dropped")


@dataclass(frozen=True)
class Gauges:
    """One instance, idle."""

    usage: float
    """Share of KV blocks in use; blocks that only the prefix cache knows are free."""
    pins: float
    reserved: float
    running: float
    waiting: float
    in_flight: float
    """Requests that the router counts there."""
    fds: int
    threads: int


def held(gauges: Gauges) -> dict[str, float]:
    """What must be as it was before: file descriptors and threads may differ by a few."""
    return {name: value for name, value in asdict(gauges).items() if name not in ("fds", "threads")}


def open_files(pids: set[int]) -> int:
    """File descriptors of all these processes."""
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)


def threads(pids: set[int]) -> int:
    """Threads of all these processes."""
    return sum(len(os.listdir(f"/proc/{pid}/task")) for pid in pids)


def read(fleet: OwnFleet, name: str) -> Gauges:
    """An instance's gauges now. A tiny request goes first: vLLM updates them when it steps."""
    body = {"model": model_of(fleet), "prompt": "x", "max_tokens": 1, "temperature": 0}
    post(f"{fleet.url(name)}/v1/completions", body)
    metrics = scrape(fleet.url(name))
    pids = fleet.pids(name)
    return Gauges(
        total(metrics, "vllm:kv_cache_usage_perc"),
        total(metrics, "vllm:fleet_pins"),
        total(metrics, "vllm:fleet_reserved_blocks"),
        total(metrics, "vllm:num_requests_running"),
        total(metrics, "vllm:num_requests_waiting"),
        total(scrape(fleet.router_admin), "vllm_fleet_router_in_flight", instance=name),
        open_files(pids),
        threads(pids),
    )


def model_of(fleet: OwnFleet) -> str:
    """The name that clients use."""
    argv = fleet.specs[fleet.instances()[0]].argv
    return argv[argv.index("--served-model-name") + 1]


def settle(fleet: OwnFleet, before: Mapping[str, Gauges], within_s: float = QUIET_S) -> tuple[dict[str, Gauges], float]:
    """The gauges of every instance once they hold what they held before, or when the time is over; and the seconds."""
    began = time.monotonic()
    while True:
        now = {name: read(fleet, name) for name in before}
        took_s = time.monotonic() - began
        if took_s >= within_s or all(held(now[name]) == held(before[name]) for name in before):
            return now, took_s
        time.sleep(TURN_S)


def rest(fleet: OwnFleet, names: Sequence[str], within_s: float = QUIET_S) -> tuple[dict[str, Gauges], float]:
    """The gauges of these instances once they hold nothing, or when the time is over; and the seconds."""
    began = time.monotonic()
    while True:
        now = {name: read(fleet, name) for name in names}
        took_s = time.monotonic() - began
        if took_s >= within_s or not any(holdings(name, now[name]) for name in names):
            return now, took_s
        time.sleep(TURN_S)


def holdings(name: str, now: Gauges) -> list[str]:
    """What an instance that nobody asks anything holds nevertheless, one sentence each."""
    return [f"{name}: {key} is {value:g}" for key, value in held(now).items() if value]


def leaks(before: Mapping[str, Gauges], now: Mapping[str, Gauges]) -> list[str]:
    """What is held now and was not before, one sentence each."""
    found = []
    for name, gauges in now.items():
        base = held(before[name])
        for key, value in held(gauges).items():
            if value != base[key]:
                found.append(f"{name}: {key} is {value:g}, was {base[key]:g}")
    return found


def growth(first: Mapping[str, Gauges], second: Mapping[str, Gauges], slack: int) -> list[str]:
    """Instances with over ``slack`` more file descriptors or threads after a second, equal round of work."""
    found = []
    for name, gauges in second.items():
        for what in ("fds", "threads"):
            more = getattr(gauges, what) - getattr(first[name], what)
            if more > slack:
                found.append(f"{name}: {more} more {what} after another round of the same work")
    return found


def counters(fleet: OwnFleet) -> dict[str, dict[str, float]]:
    """Handoffs by outcome, loads that failed, preemptions and expired pins, of each instance in its present life."""
    found = {}
    for name in fleet.instances():
        metrics = scrape(fleet.url(name))
        counted = {each: total(metrics, "vllm:fleet_handoffs_total", outcome=each) for each in HANDOFFS}
        counted["load_failures"] = total(metrics, "vllm:fleet_handoff_failures_total")
        counted["pins_expired"] = total(metrics, "vllm:fleet_pins_expired_total")
        counted["preemptions"] = total(metrics, "vllm:num_preemptions_total")
        found[name] = counted
    return found
