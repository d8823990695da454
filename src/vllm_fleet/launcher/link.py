"""The supervisor's line to the controller: what it is told, asks and hears there, in threads of its own."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vllm_fleet.config.connector import bearer, read_token
from vllm_fleet.core import limits, log
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import BadRequest, FleetError
from vllm_fleet.launcher import ask
from vllm_fleet.launcher.events import Declared, DrainAnswer, Event, Watched
from vllm_fleet.net.control_client import ControlClient
from vllm_fleet.net.watch import watch
from vllm_fleet.wire.control import Desired, Load, Member, News, Slot, Snapshot

CALL_S = 2.0
CALL_SETTING = "launcher.link.CALL_S"
CALLS_MAX = 8  # in flight at once
_UNFINISHED = re.compile(rb"^vllm:num_requests_(?:running|waiting)(?:\{[^}]*\})? ([0-9.e+]+)$", re.MULTILINE)


class Link:
    """Follows the fleet and carries orders. Nothing runs before ``start``; events come from other threads."""

    def __init__(self, token_file: Path, tell: Callable[[Event], None]) -> None:
        self._token_file, self._tell = token_file, tell
        self._client: ControlClient | None = None
        self._calls = ThreadPoolExecutor(CALLS_MAX, "fleet-orders")
        self._loop = asyncio.new_event_loop()
        self._thread: threading.Thread | None = None
        self._task: asyncio.Task[None] | None = None
        self._members: dict[str, Member] = {}
        self._desired = Desired()
        self._declared = False

    def start(self, urls: Sequence[str]) -> None:
        """Begin to follow; safe to call again."""
        if self._thread is not None:
            return
        token = bearer(read_token(self._token_file))
        self._client = ControlClient(urls, token)
        self._task = self._loop.create_task(watch(urls, token, self._on_news))
        self._thread = threading.Thread(target=self._follow, name="fleet-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End it all; returns soon, also while a call waits for its answer."""
        self._calls.shutdown(wait=False, cancel_futures=True)
        if self._thread is None:
            self._loop.close()
            return
        self._loop.call_soon_threadsafe(self._cancel)
        self._thread.join(2 * CALL_S)

    def declare(self, slots: tuple[Slot, ...]) -> None:
        """Say what the fleet is to be: the first time in any case, later only where nobody else has said; Declared
        follows."""
        self._submit(lambda: self._declare(slots))

    def ask_drain(self, name: str, generation: int | None, url: str, router: str | None) -> None:
        """Drain a life of an instance, and ask it and the router how busy it is; DrainAnswer follows."""
        self._submit(lambda: self._ask_drain(name, generation, url, router))

    def ended(self, name: str, pid: int) -> None:
        """A process of an instance has ended: if it is still a member, it leaves now and not when its lease ends."""
        member = self._members.get(name)
        if member is not None and member.pid == pid:
            self._submit(lambda: self._leave(name, member.generation))

    def _submit(self, call: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # closed meanwhile
            self._calls.submit(call)

    def _follow(self) -> None:
        asyncio.set_event_loop(self._loop)
        assert self._task is not None
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._task)
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def _cancel(self) -> None:
        assert self._task is not None
        self._task.cancel()

    def _on_news(self, news: News) -> None:
        if isinstance(news, Snapshot):
            self._members, self._desired = {member.name: member for member in news.members}, news.desired
        elif isinstance(news, Desired):
            self._desired = news
        elif news.member.state == "gone":
            self._members.pop(news.member.name, None)
        else:
            self._members[news.member.name] = news.member
        self._tell(Watched(self._desired, dict(self._members)))

    def _declare(self, slots: tuple[Slot, ...]) -> None:
        assert self._client is not None
        deadline = Deadline.after(CALL_S, CALL_SETTING)
        made: Desired | None = None
        try:
            made = self._client.desired(deadline)
            if not self._declared or not made.revision:
                made = self._client.desire(Desired(made.revision, slots), deadline)
            self._declared = True
        except FleetError as error:
            made = None
            log.warn("controller.unreachable", reason=str(error))
        finally:
            self._tell(Declared(made))

    def _leave(self, name: str, generation: int) -> None:
        assert self._client is not None
        with contextlib.suppress(FleetError):  # BadRequest: it said so itself. Else its lease ends.
            self._client.deregister(name, generation, Deadline.after(CALL_S, CALL_SETTING))

    def _ask_drain(self, name: str, generation: int | None, url: str, router: str | None) -> None:
        told, load = generation is None, None
        try:
            if generation is not None and self._client is not None:
                draining = self._client.drain(name, generation, Deadline.after(CALL_S, CALL_SETTING))
                told, load = True, draining.load
        except BadRequest:
            told = True  # this life is no member any more: nobody is sent there
        except FleetError as error:
            log.warn("controller.unreachable", reason=str(error))
        finally:
            if load is None:
                load = _own_load(url)
            self._tell(DrainAnswer(name, told, _with_router(load, name, router)))


def _own_load(url: str) -> Load | None:
    """What an instance itself says, where its heartbeats do not."""
    page = _page(f"{url}/metrics")
    found = _UNFINISHED.findall(page) if page is not None else []
    return Load(int(sum(map(float, found))), None) if found else None


def _with_router(load: Load | None, name: str, router: str | None) -> Load | None:
    """The router counts a request from the moment that it chooses an instance; an engine when it gets there."""
    page = _page(f"{router}/metrics") if router is not None and load is not None else None
    if load is None or page is None:
        return load
    wanted = rb'^vllm_fleet_router_in_flight\{[^}]*instance="%s"[^}]*\} ([0-9.e+]+)$' % re.escape(name.encode())
    in_flight = int(sum(map(float, re.findall(wanted, page, re.MULTILINE))))
    return Load(max(load.requests, in_flight), load.held)


def _page(url: str) -> bytes | None:
    try:
        status, body = ask.get(url, Deadline.after(limits.PROBE_S, "limits.PROBE_S"))
    except FleetError:
        return None
    return body if status == 200 else None
