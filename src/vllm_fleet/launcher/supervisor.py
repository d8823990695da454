"""The shell around launcher.reactor: one loop that gathers events, lets the reactor decide and does what it says.

Signal handlers only append to a list; the loop takes them from there.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

from vllm_fleet.config.fleet import LauncherConfig
from vllm_fleet.core import limits, log
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import FleetError
from vllm_fleet.launcher import ask, events, logs, preflight, processes, reactor
from vllm_fleet.launcher.child import ChildProcess
from vllm_fleet.launcher.processes import ProcessId
from vllm_fleet.launcher.reactor import Child, Fleet
from vllm_fleet.launcher.record import FleetRecord, ProcessRecord, write_record
from vllm_fleet.launcher.registrar import Registrar
from vllm_fleet.launcher.rundir import RunDir
from vllm_fleet.launcher.spec import ProcessSpec

TURN_S = 0.05
SERVING_TURN_S = 0.2
REMEMBER_EVERY_S = 5.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Planner = Callable[[Mapping[str, int]], tuple[ProcessSpec, ...]]


class View(Protocol):
    """Shows a fleet to whoever started it. Called from the supervisor's loop: it must not block."""

    def show(self, record: FleetRecord) -> None:
        """The fleet now; called at every change and a few times a second."""

    def note(self, text: str) -> None:
        """Something happened that the user should read."""

    def output(self, name: str, line: str) -> None:
        """A line that a process wrote."""

    def ready(self, record: FleetRecord) -> None:
        """Every process answers."""


@dataclass(frozen=True)
class Outcome:
    """How the fleet ended."""

    code: int
    reason: str = ""
    lines: tuple[str, ...] = ()
    """The lines of the failed process's log that matter."""
    log: str = ""
    """That log."""


class Supervisor:
    """Runs one fleet from the first start to the last death. The caller holds the run folder's lock."""

    def __init__(
        self, run: RunDir, planner: Planner, ports: Mapping[str, int], fixed: frozenset[str],
        settings: LauncherConfig, model: str, environ: Mapping[str, str], view: View, *, verbose: bool = False,
        side_host: str = "127.0.0.1",
    ) -> None:  # fmt: skip
        """``side_host`` is where ports that instances need beside their own are chosen."""
        self._run, self._planner, self._ports, self._view = run, planner, dict(ports), view
        self._environ, self._model, self._verbose, self._side_host = environ, model, verbose, side_host
        self._specs = {spec.name: spec for spec in planner(self._ports)}
        children = {name: Child(name, spec.kind, name in fixed) for name, spec in self._specs.items()}
        self._fleet = Fleet(children, settings.ready_s, settings.stop_s)
        self._running: dict[str, ChildProcess] = {}
        self._pids: dict[str, ProcessId] = {}
        self._since: dict[str, tuple[str, float]] = {}
        self._signals: list[int] = []
        self._answers: queue.SimpleQueue[events.Answered] = queue.SimpleQueue()
        self._followers = {name: logs.Follower(run.log_file(name)) for name in self._specs} if verbose else {}
        self._probers = ThreadPoolExecutor(limits.PROBES_MAX, "fleet-probe")
        self._registrar = Registrar(run.token_file)
        self._lines: tuple[str, ...] = ()
        self._code: int | None = None
        self._remember_at = 0.0
        self._written: FleetRecord | None = None
        me = processes.identify(os.getpid())
        assert me is not None
        self._me, self._boot = me, processes.boot_id()

    def stop(self) -> None:
        """Ask for the stop, as a signal would; a second time kills at once. Any thread may call it."""
        self._signals.append(signal.SIGTERM)

    def run(self) -> Outcome:
        """Start the fleet and stay until it has ended; nothing of it is left then."""
        for name in self._specs:
            self._run.rotate_log(name)
        with self._handlers():
            try:
                self._take(events.Began())
                while self._code is None:
                    self._turn()
            finally:
                self._last_resort()
                self._registrar.close()
                self._probers.shutdown(cancel_futures=True)
        fleet = self._fleet
        self._show_output()
        self._publish()
        log_file = str(self._run.log_file(fleet.failed)) if fleet.failed is not None else ""
        return Outcome(self._code, fleet.reason, self._lines, log_file)

    def _turn(self) -> None:
        turn_s = SERVING_TURN_S if self._fleet.phase == "serving" else TURN_S
        with contextlib.suppress(queue.Empty):
            self._take(self._answers.get(timeout=turn_s))
            while self._code is None:
                self._take(self._answers.get_nowait())
        while self._signals and self._code is None:
            self._signals.pop(0)
            self._take(events.StopAsked())
        for name in [name for name, child in self._running.items() if child.poll()]:
            if self._code is None:
                self._take(self._bury(name))
        if self._code is None:
            self._take(events.Tick())
        if time.monotonic() >= self._remember_at:
            self._remember()
        self._show_output()
        self._publish()

    def _take(self, event: events.Event) -> None:
        pending: deque[events.Event] = deque([event])
        while pending and self._code is None:
            for effect in reactor.step(self._fleet, pending.popleft(), time.monotonic()):
                followed = self._do(effect)
                if followed is not None:
                    pending.append(followed)
            if self._fleet.failed is not None and not self._lines:
                self._lines = tuple(logs.why(logs.tail(self._run.log_file(self._fleet.failed))))

    def _do(self, effect: events.Effect) -> events.Event | None:
        match effect:
            case events.Start(name):
                return self._start(name)
            case events.Repick(name):
                preflight.choose_again(self._ports, name, self._side_host)
                self._specs = {spec.name: spec for spec in self._planner(self._ports)}
            case events.Probe(name):
                # A router that came back answers 503 while no instance is left: it is up, and not to be killed for it.
                back = self._fleet.children[name].was_ready
                self._probers.submit(self._probe, name, self._specs[name].health_url, back)
            case events.Terminate(name):
                self._signal(name, signal.SIGTERM)
            case events.Kill(name):
                self._signal(name, signal.SIGKILL)
            case events.Note(event, name, text):
                log.warn(event, child=name, reason=text)
                self._view.note(text)
            case events.Ready():
                self._remember()
                self._publish()
                self._view.ready(self._record())
            case events.Finish(code):
                self._code = code
        return None

    def _start(self, name: str) -> events.Event | None:
        spec = self._specs[name]
        try:
            if spec.settings is not None and spec.settings_file is not None:
                self._run.write_settings(spec.settings_file, spec.settings)
            child = ChildProcess(spec, self._run.log_file(name), self._environ)
        except (FleetError, OSError) as error:
            return events.Exited(name, None, str(error))
        self._running[name] = child
        self._pids[name] = child.id
        self._registrar.began(spec, child.pid, self._controller_url())
        log.event("child.start", child=name, pid=child.pid)
        self._publish()
        return None

    def _controller_url(self) -> str:
        return next(spec.url for spec in self._specs.values() if spec.kind == "controller")

    def _bury(self, name: str) -> events.Exited:
        self._registrar.ended(name)
        child = self._running.pop(name)
        code = child.bury()
        lines = logs.tail(self._run.log_file(name))
        if self._fleet.children[name].was_ready:  # what it said long before its end explains nothing
            lines = lines[-limits.LOG_END_LINES :]
        picked = logs.why(lines)
        log.event("child.exit", child=name, pid=child.pid, code=code)
        return events.Exited(name, code, logs.summary(picked) if code > 0 else "", logs.port_taken(picked))

    def _probe(self, name: str, url: str, any_status: bool) -> None:
        healthy = ask.healthy(url, Deadline.after(limits.PROBE_S, "limits.PROBE_S"), any_status=any_status)
        self._answers.put(events.Answered(name, healthy))

    def _signal(self, name: str, signum: signal.Signals) -> None:
        self._registrar.ended(name)  # out of routing first: while it drains, /health answers and requests fail
        child = self._running.get(name)
        if child is not None:
            child.remember(processes.table())
            child.signal_group(signum)

    def _remember(self) -> None:
        self._remember_at = time.monotonic() + REMEMBER_EVERY_S
        rows = processes.table() if self._running else []
        for child in self._running.values():
            child.remember(rows)

    def _show_output(self) -> None:
        for name, follower in self._followers.items():
            for line in follower.lines():
                self._view.output(name, line)

    def _publish(self) -> None:
        record = self._record()
        self._view.show(record)
        if record != self._written:
            try:
                write_record(self._run, record)
                self._written = record
            except OSError as error:  # a full disk does not stop a fleet
                if self._written is not None:
                    log.warn("record.failed", reason=str(error))
                    self._written = None

    def _record(self) -> FleetRecord:
        fleet = self._fleet
        records = tuple(self._process_record(child) for child in fleet.children.values())
        return FleetRecord(
            self._run.folder.name, self._model, self._boot, self._me, fleet.phase, fleet.stop_s, records,
            fleet.reason, self._lines,
        )  # fmt: skip

    def _process_record(self, child: Child) -> ProcessRecord:
        name, spec, running = child.name, self._specs[child.name], self._running.get(child.name)
        state, since = self._since.get(name, ("", 0.0))
        if state != child.state:
            since = time.time()
            self._since[name] = (child.state, since)
        tree, left = (running.tree, running.leftovers) if running is not None else (set(), set())
        return ProcessRecord(
            name, spec.kind, spec.role, spec.url, child.state, since, str(self._run.log_file(name)),
            self._pids.get(name), tuple(sorted(tree)), tuple(sorted(left, key=lambda one: one.path)), spec.tmp,
        )  # fmt: skip

    def _last_resort(self) -> None:
        """Whatever happened to us: no child outlives its supervisor's loop."""
        for child in self._running.values():
            child.signal_group(signal.SIGKILL)
        until = time.monotonic() + reactor.KILL_GRACE_S
        for name, child in list(self._running.items()):
            while not child.poll() and time.monotonic() < until:
                time.sleep(TURN_S)
            if child.poll():
                child.bury()
                del self._running[name]

    @contextlib.contextmanager
    def _handlers(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {signum: signal.signal(signum, self._on_signal) for signum in SIGNALS}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self._signals.append(signum)
