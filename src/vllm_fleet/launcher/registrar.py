"""Speaks for instances that cannot register themselves: one thread that lets membership.Life decide, and a few that
ask. The supervisor's own loop stays free of the controller, and a slow instance delays nobody else's heartbeat."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from vllm_fleet.config.connector import bearer, read_token
from vllm_fleet.core import limits, log
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.env import RealEnv
from vllm_fleet.core.errors import BadRequest, FleetError
from vllm_fleet.launcher import ask
from vllm_fleet.launcher.membership import Act, Ask, Beat, Join, Leave, Life
from vllm_fleet.launcher.spec import ProcessSpec
from vllm_fleet.net.control_client import ControlClient
from vllm_fleet.wire.names import Role

TURN_S = 0.05
CALL_S = 2.0
CALL_SETTING = "launcher.registrar.CALL_S"
CALLERS_MAX = 8  # calls to the controller in flight at once
CLOSE_S = 2 * CALL_S


@dataclass
class _Member:
    life: Life
    client: ControlClient
    reachable: bool = True


class Registrar:
    """The instances of one supervisor that cannot register themselves. No thread runs before the first one."""

    def __init__(self, token_file: Path) -> None:
        self._token_file = token_file
        self._env = RealEnv()
        self._members: list[_Member] = []
        self._lock = threading.Lock()
        """Guards every Life: they are told of answers by several threads."""
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def began(self, spec: ProcessSpec, pid: int, controller: Sequence[str]) -> None:
        """A process was started; nothing happens when it registers itself."""
        if spec.fingerprint is None:
            return
        role = cast(Role, spec.role)
        life = Life(spec.name, role, spec.url, pid, self._env.new_id(), dict(spec.fingerprint))
        client = ControlClient(controller, bearer(read_token(self._token_file)))
        with self._lock:
            self._members.append(_Member(life, client))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="fleet-registrar", daemon=True)
            self._thread.start()

    def ended(self, name: str) -> None:
        """The process is told to stop, or is dead: it leaves the fleet. Safe to call twice, and for anybody."""
        with self._lock:
            for member in self._members:
                if member.life.name == name:
                    member.life.end()

    def close(self) -> None:
        """All leave; returns when they have, or after CLOSE_S."""
        with self._lock:
            for member in self._members:
                member.life.end()
        self._closing.set()
        if self._thread is not None:
            self._thread.join(CLOSE_S + 2 * TURN_S)

    def _run(self) -> None:
        close_at = float("inf")
        with (
            ThreadPoolExecutor(limits.PROBES_MAX, "fleet-health") as probers,
            ThreadPoolExecutor(CALLERS_MAX, "fleet-member") as callers,
        ):
            while time.monotonic() < close_at:
                if self._closing.is_set():
                    close_at = min(close_at, time.monotonic() + CLOSE_S)
                for member, act in self._due():
                    if isinstance(act, Ask):
                        probers.submit(self._ask, member)
                    else:
                        callers.submit(self._call, member, act)
                with self._lock:
                    self._members = [member for member in self._members if not member.life.over]
                    if self._closing.is_set() and not self._members:
                        break
                time.sleep(TURN_S)
            probers.shutdown(wait=False, cancel_futures=True)
            callers.shutdown(wait=False, cancel_futures=True)

    def _due(self) -> list[tuple[_Member, Act]]:
        with self._lock:
            now = time.monotonic()
            return [(member, act) for member in self._members for act in member.life.due(now)]

    def _ask(self, member: _Member) -> None:
        url = f"{member.life.url}/health"
        healthy = ask.healthy(url, Deadline.after(limits.PROBE_S, "limits.PROBE_S"))
        with self._lock:
            member.life.on_health(healthy, time.monotonic())

    def _call(self, member: _Member, act: Act) -> None:
        life, deadline = member.life, Deadline.after(CALL_S, CALL_SETTING)
        try:
            if isinstance(act, Join):
                answer = member.client.register(act.request, deadline)
                log.event("instance.registered", instance=life.name, generation=answer.generation)
                with self._lock:
                    life.on_joined(answer, time.monotonic())
            elif isinstance(act, Beat):
                ack = member.client.heartbeat(act.name, act.beat, deadline)
                with self._lock:
                    life.on_beat(ack.heartbeat_s, time.monotonic())
            elif isinstance(act, Leave):
                member.client.deregister(act.name, act.generation, deadline)
            member.reachable = True
        except FleetError as error:
            if member.reachable:
                log.warn("controller.unreachable", instance=life.name, reason=str(error))
            member.reachable = False
            with self._lock:
                life.on_failed(time.monotonic(), unknown=isinstance(error, BadRequest))
        if isinstance(act, Leave):
            with self._lock:
                life.on_left()
