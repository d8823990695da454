"""One process on a node of a Ray cluster, as the supervisor sees it: an actor there, and a thread here.

The thread has the process placed and started, fetches its log and learns of its end. Ray's actors die with their driver
(this process), and what they keep dies with them.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import msgspec

from vllm_fleet.core import log
from vllm_fleet.core.errors import Busy, FleetError
from vllm_fleet.launcher.hosts import keeper, late, ray_actor
from vllm_fleet.launcher.hosts.keeper import Began, Failed, Order
from vllm_fleet.launcher.hosts.placement import Node
from vllm_fleet.launcher.leftovers import Leftover
from vllm_fleet.launcher.processes import ProcessId, Row
from vllm_fleet.launcher.spec import ProcessSpec

PLACE_S = 10.0
START_S = 90.0  # Ray starts a Python for the actor, and the actor one for the keeper
KEEPER_S = 20.0  # a keeper starts a Python
FOLLOW_S = 2.0
SLACK_S = 8.0  # an answer is late by at most so much
RETRY_S = 0.5
TURN_S = 0.5
KILL_S = 5.0  # after SIGKILL was asked for; then the actor is killed
BURY_S = 2.0
LOST = 1
"""Exit code of a process whose actor or node is gone: its own will never be known."""


class Cluster(Protocol):
    """What is asked of the connection."""

    def rows(self) -> list[ray_actor.NodeRow]:
        """All nodes, dead ones too; PeerGone when the cluster does not answer."""


class Places(Protocol):
    """Who knows where there is room."""

    def place(self, process: RayProcess, spec: ProcessSpec) -> Node:
        """A node with room, held until ``release``; Busy when there is none, PeerGone when the cluster is silent."""

    def release(self, process: RayProcess) -> None:
        """It holds nothing any more."""


class RayProcess:
    """One process on a node. See ``contract.Handle``."""

    def __init__(self, places: Places, cluster: Cluster, spec: ProcessSpec, log_file: Path, order: Order) -> None:
        self.node = self.reason = ""
        self.spec: ProcessSpec | None = None
        self.id: ProcessId | None = None
        self.pid = 0
        self.tree: set[ProcessId] = set()
        self.leftovers: set[Leftover] = set()
        self._places, self._cluster, self._asked, self._log_file, self._order = places, cluster, spec, log_file, order
        self._node_id = ""
        self._code: int | None = None
        self._kill_at = float("inf")
        self._actor: Any = None
        self._thread = threading.Thread(target=self._run, name=f"fleet-ray-{spec.name}", daemon=True)
        self._thread.start()

    def poll(self) -> bool:
        """Whether it has ended, or its actor or node has."""
        return self._code is not None

    def remember(self, rows: Iterable[Row]) -> None:
        """Nothing: its keeper does."""

    def signal_group(self, signum: signal.Signals) -> None:
        """Signal it and its helpers. One that was not started yet never is."""
        if self._code is not None:
            return
        if signum == signal.SIGKILL:
            self._kill_at = min(self._kill_at, time.monotonic() + KILL_S)
        if self.spec is None:
            self._kill_at = 0.0
        elif self._actor is not None:
            with contextlib.suppress(ConnectionError, RuntimeError):  # the cluster is gone, and it with it
                ray_actor.check_connected()
                self._actor.send.remote(int(signum))

    def bury(self) -> int:
        """Its exit code. All of it was removed on its node before it counted as ended."""
        self._thread.join(BURY_S)
        assert self._code is not None, "bury is for what has ended"
        return self._code

    def drop(self) -> None:
        """End it now, actor and all; returns when nobody asks Ray about it any more, or after BURY_S."""
        self._kill_at = 0.0
        self._thread.join(BURY_S)

    def _run(self) -> None:
        import ray

        code = LOST
        try:
            self._place()
            guard = ray.remote(ray_actor.Guard)
            self._actor = guard.options(**ray_actor.options(dict(self._asked.needs or {}), self._node_id)).remote()
            if self._start():
                code = self._follow()
        except _Killed:
            code = -signal.SIGKILL
        except FleetError as error:
            self.reason = str(error)
        except (ray.exceptions.RayError, ConnectionError, RuntimeError, OSError) as error:
            self.reason = self._why(error)
        finally:
            if self._actor is not None:
                with contextlib.suppress(ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError):
                    ray_actor.check_connected()
                    ray.kill(self._actor)
            self._places.release(self)
            self._code = code

    def _place(self) -> None:
        """Find it a node; for a while, as what ended a moment ago may still count as holding what it held."""
        until = time.monotonic() + PLACE_S
        while True:
            if time.monotonic() >= self._kill_at:
                raise _Killed
            try:
                node = self._places.place(self, self._asked)
            except Busy:
                if time.monotonic() >= until:
                    raise
                time.sleep(RETRY_S)
                continue
            self.node, self._node_id = node.address, node.id
            self._order = msgspec.structs.replace(self._order, host=node.address)
            return

    def _start(self) -> bool:
        """Whether it runs; ``reason`` says why not."""
        answer = self._get(self._actor.start.remote(keeper.encode_line(self._order), KEEPER_S), START_S)
        report = keeper.decode_report(answer)
        if isinstance(report, Failed):
            self.reason = f"cannot start {self._asked.name} on node {self.node}: {report.reason}"
            self._fetch(0, 0.0)
            return False
        assert isinstance(report, Began)
        self.pid = report.pid
        self.spec = late.settled(self._asked, report.site)
        return True

    def _follow(self) -> int:
        """Fetch the log until the end; the exit code."""
        import ray

        offset = 0
        while True:
            try:
                offset, news = self._fetch(offset, FOLLOW_S)
            except (ray.exceptions.ActorUnavailableError, ray.exceptions.GetTimeoutError):
                time.sleep(RETRY_S)  # a network that comes back, or Ray says in the end that the node is dead
                continue
            if news.ended is not None:
                self.reason = news.reason
                return news.ended

    def _fetch(self, offset: int, wait_s: float) -> tuple[int, ray_actor.News]:
        words, raw = self._get(self._actor.follow.remote(offset, wait_s), wait_s + SLACK_S)
        news = ray_actor.decode_news(raw)
        with contextlib.suppress(OSError), self._log_file.open("ab") as stream:  # a full disk does not stop a fleet
            if news.offset > offset:
                stream.write(f"[vllm-fleet: {news.offset - offset} bytes of output were lost here]\n".encode())
            stream.write(words)
        return news.offset + len(words), news

    def _get(self, reference: Any, wait_s: float) -> Any:
        """The answer; _Killed once the patience with a process that is to be killed is over."""
        import ray

        until = time.monotonic() + wait_s
        while True:
            if time.monotonic() >= self._kill_at:
                raise _Killed
            ray_actor.check_connected()
            left_s = until - time.monotonic()
            try:
                return ray.get(reference, timeout=max(0.0, min(left_s, TURN_S)))
            except ray.exceptions.GetTimeoutError:
                if left_s <= 0:
                    raise

    def _why(self, error: Exception) -> str:
        """A sentence about the end of its actor."""
        try:
            row = next((row for row in self._cluster.rows() if row.id == self._node_id), None)
        except FleetError:
            row = None
        if row is not None and not row.alive:
            return f"node {self.node} is gone, and {self._asked.name} with it ({row.death or 'Ray does not say why'})"
        log.warn("cluster.actor_lost", child=self._asked.name, node=self.node, reason=first_line(error))
        if self.spec is None:
            return f"{self._asked.name} could not be started on node {self.node}: {last_line(error)}"
        return f"the Ray actor of {self._asked.name} on node {self.node} is gone: {last_line(error)}"


class _Killed(Exception):
    """It was to be killed, and its actor said nothing: the actor is killed, and the process dies with it."""


def first_line(error: BaseException) -> str:
    """Of its message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def last_line(error: BaseException) -> str:
    """Of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
