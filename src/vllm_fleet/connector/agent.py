"""Registers this instance with the controller and says that it lives; a thread in the engine's process.

The data path does not need it: while the controller is away, the agent keeps trying and the instance keeps serving.
"""

from __future__ import annotations

import http.client
import os
import threading
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from vllm_fleet.config.connector import ConnectorSettings
from vllm_fleet.core import log
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import BadRequest, FleetError
from vllm_fleet.net.control_client import ControlClient
from vllm_fleet.wire.control import Heartbeat, Load, Register, Registered, ReportedState
from vllm_fleet.wire.ticket import WorkerAddress

CALL_S = 2.0
CALL_SETTING = "connector.agent.CALL_S"
RETRY_S = 0.5
HEALTH_S = 0.2


class Agent:
    """One instance's membership. ``incarnation`` is the engine's id: another after each restart."""

    def __init__(
        self,
        settings: ConnectorSettings,
        token: str,
        incarnation: str,
        layout: Mapping[str, str],
        load: Callable[[], Load] | None = None,
    ) -> None:
        """``load``: how busy the engine is; None where nobody can say."""
        assert settings.controller is not None
        assert settings.url is not None
        self._name, self._role, self._url = settings.name, settings.role, settings.url
        self._client = ControlClient(settings.controller, token)
        self._incarnation, self._load = incarnation, load
        self._fingerprint = dict(layout)
        self._pid = os.getppid()  # the API server, which started this engine
        self._workers: tuple[WorkerAddress, ...] = ()
        self._stopped = threading.Event()
        self._registered: Registered | None = None
        self._serving = False
        self._thread = threading.Thread(target=self._run, name="fleet-agent", daemon=True)

    def start(self, workers: tuple[WorkerAddress, ...]) -> None:
        """Begin; ``workers``: where peers reach this instance's workers, in rank order."""
        self._workers = workers
        self._thread.start()

    def stop(self) -> None:
        """Leave the fleet, if the controller answers soon."""
        self._stopped.set()
        self._thread.join(timeout=2 * CALL_S)

    def _run(self) -> None:
        reachable = True
        while not self._stopped.is_set():
            try:
                pause_s = self._beat()
                reachable = True
            except FleetError as error:
                if isinstance(error, BadRequest):
                    self._registered = None  # the controller does not know us, or another took our name: say who we are
                if reachable:
                    log.warn("controller.unreachable", reason=str(error))
                reachable, pause_s = False, RETRY_S
            self._stopped.wait(pause_s)
        self._leave()

    def _beat(self) -> float:
        """Register or send a heartbeat; seconds until the next."""
        if not self._serving:
            self._serving = self._answers()
        state: ReportedState = "ready" if self._serving else "starting"
        deadline = Deadline.after(CALL_S, CALL_SETTING)
        told_s: float | None = None
        if self._registered is None:
            hello = Register(
                self._name,
                self._role,
                self._url,
                self._pid,
                self._incarnation,
                state,
                self._fingerprint,
                self._workers,
            )
            self._registered = self._client.register(hello, deadline)
            log.event("instance.registered", instance=self._name, generation=self._registered.generation)
        else:
            load = None if self._load is None else self._load()
            beat = Heartbeat(self._registered.generation, state, load)
            told_s = self._client.heartbeat(self._name, beat, deadline).heartbeat_s
        if not self._serving:
            return HEALTH_S
        return self._registered.heartbeat_s if told_s is None else told_s

    def _leave(self) -> None:
        if self._registered is None:
            return
        try:
            self._client.deregister(self._name, self._registered.generation, Deadline.after(CALL_S, CALL_SETTING))
        except FleetError as error:
            log.warn("controller.unreachable", reason=str(error))

    def _answers(self) -> bool:
        """Whether this instance's own server answers its health check."""
        parts = urlsplit(self._url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=CALL_S)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
