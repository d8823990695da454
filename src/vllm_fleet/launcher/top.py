"""What a fleet does now, for ``vllm-fleet top``: pages of its processes, and what follows from two looks at them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from msgspec import Struct

from vllm_fleet.config.connector import bearer, read_token
from vllm_fleet.core import limits
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import Corrupt, FleetError, PeerGone
from vllm_fleet.launcher import ask
from vllm_fleet.launcher.down import not_running
from vllm_fleet.launcher.page import Page, quantile
from vllm_fleet.launcher.record import FleetRecord, read_record
from vllm_fleet.launcher.rundir import RunDir
from vllm_fleet.net.control_client import ControlClient

ROUTER = "vllm_fleet_router_"
_WANTED = (
    ROUTER,
    "vllm:num_requests_",
    "vllm:kv_cache_usage_perc",
    "vllm:generation_tokens_total",
    "vllm:prompt_tokens_total",
    "vllm:fleet_handoffs_total",
    "vllm:fleet_handoff_failures_total",
)
_SETTING = "limits.TOP_INSTANCES_S"
_ROLES = ("prefill", "decode", "both")


@dataclass(frozen=True, slots=True)
class Look:
    """What everybody said at one time. An instance or router that did not answer has no page."""

    at: float
    """On the monotonic clock."""
    record: FleetRecord
    states: Mapping[str, str]
    """Of instances, by the controller; empty: it does not answer."""
    pages: Mapping[str, Page]
    router: Page | None


class InstanceRow(Struct, frozen=True):
    """One instance; None is what it did not say."""

    name: str
    role: str
    state: str
    in_flight: int | None = None
    """Requests that the router has there."""
    running: int | None = None
    waiting: int | None = None
    kv_used: float | None = None
    """Share of its KV cache; of its fullest engine."""
    prompt_tokens_s: float | None = None
    tokens_s: float | None = None
    """Tokens it wrote."""
    handoffs: int | None = None
    """Prompts it computed for others, or took over."""
    failures: int | None = None
    """Loads of KV that failed, and handoffs that it computed again or refused."""


class RouterRow(Struct, frozen=True):
    """The router, all its workers together."""

    url: str
    requests_s: float = 0.0
    errors_s: float = 0.0
    """Answers of 500 and more."""
    refused_s: float = 0.0
    """Answers of 400 to 499, hung-up clients not counted."""
    in_flight: int = 0
    waiting: int = 0
    first_byte_p50_s: float | None = None
    first_byte_p99_s: float | None = None
    retries: int = 0
    resumes: int = 0
    handed_off: int = 0
    requests: int = 0


class Top(Struct, frozen=True):
    """The fleet between two looks."""

    fleet: str
    model: str
    phase: str
    window_s: float
    """How far back times to the first byte go; 0: to the router's start."""
    router: RouterRow | None
    """None: it does not answer."""
    instances: tuple[InstanceRow, ...]
    remarks: tuple[str, ...] = ()


class Looker:
    """Asks everybody at once; use as ``with``."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._pool = ThreadPoolExecutor(limits.PROBES_MAX, "fleet-top")

    def __enter__(self) -> Looker:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def look(self) -> Look:
        """FleetError: no such fleet runs."""
        record = read_record(self._run)
        if record is None or not (record.supervised() or record.living()):
            raise not_running(self._run)
        instances = {each.name: each.url for each in record.processes if each.kind == "instance" and each.url}
        states = self._pool.submit(self._states, record)
        asked = {name: self._pool.submit(_page, url) for name, url in instances.items()}
        router = self._pool.submit(_page, record.admin_url())
        # One deadline each, and PROBES_MAX at a time: a fleet that hangs as a whole costs several of them.
        pages = {name: page for name, one in asked.items() if (page := one.result()) is not None}
        return Look(time.monotonic(), record, states.result(), pages, router.result())

    def _states(self, record: FleetRecord) -> dict[str, str]:
        try:
            client = ControlClient(record.urls("controller"), bearer(read_token(self._run.token_file)))
            members = client.snapshot(Deadline.after(limits.TOP_INSTANCES_S, _SETTING)).members
        except FleetError:
            return {}
        return {member.name: member.state for member in members}


def _page(url: str) -> Page | None:
    try:
        status, body = ask.get(f"{url}/metrics", Deadline.after(limits.TOP_INSTANCES_S, _SETTING))
    except (PeerGone, Corrupt):
        return None
    return Page(body.decode(errors="replace"), _WANTED) if status == 200 else None


def top(now: Look, before: Look, first: Look | None) -> Top:
    """What happened since ``before``; times to the first byte since ``first``, without it since the router's start."""
    remarks = []
    if not now.states:
        remarks.append("the controller does not answer: states are the supervisor's")
    if now.router is None:
        remarks.append("the router does not answer")
    rows = [_instance(name, now, before) for name in _names(now.record)]
    window_s = 0.0 if first is None else now.at - first.at
    router = None if now.router is None else _router(now, before, first)
    record = now.record
    return Top(record.fleet, record.model, record.phase, window_s, router, tuple(rows), tuple(remarks))


def _names(record: FleetRecord) -> list[str]:
    def order(name: str) -> tuple[int, str, int]:
        stem, _, number = name.rpartition("-")
        role = roles[name]
        at = _ROLES.index(role) if role in _ROLES else len(_ROLES)
        return (at, stem, int(number)) if number.isdecimal() else (at, name, 0)

    roles = {each.name: each.role for each in record.processes if each.kind == "instance"}
    return sorted(roles, key=order)


def _instance(name: str, now: Look, before: Look) -> InstanceRow:
    process = next(each for each in now.record.processes if each.name == name)
    state = process.state
    if state in ("starting", "ready"):
        state = now.states.get(name, state)  # type: ignore[assignment]  # the controller has words of its own
    page, last = now.pages.get(name), before.pages.get(name)
    in_flight = None
    if now.router is not None:
        in_flight = int(now.router.total(f"{ROUTER}in_flight", instance=name))
    if page is None:
        return InstanceRow(name, process.role, state, in_flight)

    def rate(metric: str) -> float | None:
        return _rate(lambda seen: seen.total(metric), page, last, now.at - before.at)

    def ended(*outcomes: str) -> int:
        return int(sum(page.total("vllm:fleet_handoffs_total", outcome=outcome) for outcome in outcomes))

    return InstanceRow(
        name,
        process.role,
        state,
        in_flight,
        int(page.total("vllm:num_requests_running")),
        int(page.total("vllm:num_requests_waiting")),
        page.largest("vllm:kv_cache_usage_perc"),
        rate("vllm:prompt_tokens_total"),
        rate("vllm:generation_tokens_total"),
        ended("held", "loaded", "local"),
        ended("recomputed", "refused") + int(page.total("vllm:fleet_handoff_failures_total")),
    )


def _rate(read: Callable[[Page], float], page: Page, last: Page | None, seconds: float) -> float | None:
    """Growth a second; a counter that went back was started anew."""
    if last is None or seconds <= 0:
        return None
    new, old = read(page), read(last)
    return (new - old if new >= old else new) / seconds


def _router(now: Look, before: Look, first: Look | None) -> RouterRow:
    page, seconds = now.router, now.at - before.at
    assert page is not None, "a router that did not answer has no row"

    def rate(low: int, high: int) -> float:
        return _rate(lambda seen: _answers(seen, low, high), page, before.router, seconds) or 0.0

    name = f"{ROUTER}time_to_first_byte_seconds"
    since: Mapping[float, float] = {}
    if first is not None and first.router is not None:
        since = first.router.buckets(name)
    after = page.buckets(name)
    if any(after.get(end, 0.0) < count for end, count in since.items()):
        since = {}  # the router was started anew
    return RouterRow(
        now.record.url("router"),
        rate(0, 1000),
        rate(500, 1000),
        rate(400, 499),
        int(page.total(f"{ROUTER}in_flight")),
        int(page.total(f"{ROUTER}waiting")),
        quantile(0.5, since, after),
        quantile(0.99, since, after),
        int(page.total(f"{ROUTER}retries_total")),
        int(page.total(f"{ROUTER}resumes_total") - page.total(f"{ROUTER}resumes_total", way="none")),
        int(page.total(f"{ROUTER}handoffs_total", outcome="handed_off")),
        int(page.total(f"{ROUTER}handoffs_total")),
    )


def _answers(page: Page, low: int, high: int) -> float:
    """Answers to clients' requests whose status is ``low`` or more and below ``high``; operators' are not counted."""
    return sum(
        value
        for labels, value in page.samples(f"{ROUTER}requests_total")
        if labels.get("route", "").startswith("/v1/") and low <= int(labels.get("status", "0") or 0) < high
    )
