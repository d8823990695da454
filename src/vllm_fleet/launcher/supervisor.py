"""The shell around launcher.reactor: one loop that gathers events, lets the reactor decide and does what it says."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from vllm_fleet.core import limits, log
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import FleetError
from vllm_fleet.launcher import ask, events, logs, processes, reactor, signals
from vllm_fleet.launcher.fleet import Child, Fleet, Rules, role_of
from vllm_fleet.launcher.hosts.contract import Handle, Launcher
from vllm_fleet.launcher.hosts.local import LocalLauncher
from vllm_fleet.launcher.link import Link
from vllm_fleet.launcher.planner import Planner
from vllm_fleet.launcher.processes import ProcessId
from vllm_fleet.launcher.record import FleetRecord, GpuRecord, ProcessRecord, write_record
from vllm_fleet.launcher.registrar import Registrar
from vllm_fleet.launcher.rundir import RunDir
from vllm_fleet.launcher.spec import ProcessSpec
from vllm_fleet.launcher.view import Outcome, View
from vllm_fleet.wire.names import ROLES

TURN_S = 0.05
SERVING_TURN_S = 0.2
REMEMBER_EVERY_S = 5.0


class Supervisor:
    """Runs one fleet from the first start to the last death. The caller holds the run folder's lock."""

    def __init__(
        self, run: RunDir, planner: Planner, fixed: frozenset[str], rules: Rules, model: str,
        environ: Mapping[str, str], view: View, *, verbose: bool = False, launcher: Launcher | None = None,
    ) -> None:  # fmt: skip
        """``fixed``: processes whose port the user chose. ``launcher``: None starts all of them on this machine."""
        self._run, self._planner, self._view = run, planner, view
        self._model, self._verbose = model, verbose
        self._launcher: Launcher = LocalLauncher(environ) if launcher is None else launcher
        slots = planner.first()
        self._specs = {spec.name: spec for spec in planner.own()}
        children = {name: Child(name, spec.kind, name in fixed) for name, spec in self._specs.items()}
        children |= {slot.name: Child(slot.name, "instance", role=slot.role) for slot in slots}
        self._fleet = Fleet(children, rules, slots, planner.gpus, planner.gpus_of)
        self._running: dict[str, Handle] = {}
        self._unplaced: set[str] = set()
        """Those of them that run elsewhere, it is not known where."""
        self._pids: dict[str, ProcessId] = {}
        self._since: dict[str, tuple[str, float]] = {}
        self._signals: list[int] = []
        self._answers: queue.SimpleQueue[events.Event] = queue.SimpleQueue()
        self._followers = {name: logs.Follower(run.log_file(name)) for name in self._specs} if verbose else {}
        self._probers = ThreadPoolExecutor(limits.PROBES_MAX, "fleet-probe")
        self._registrar = Registrar(run.token_file)
        self._link = Link(run.token_file, self._answers.put)
        self._lines: tuple[str, ...] = ()
        self._code: int | None = None
        self._remember_at = 0.0
        self._written: FleetRecord | None = None
        me = processes.identify(os.getpid())
        assert me is not None
        self._me, self._boot = me, processes.boot_id()
        for slot in slots:
            self._plan(slot.name)

    def stop(self) -> None:
        """Ask for the stop, as a signal would; a second time kills at once. Any thread may call it."""
        self._signals.append(signal.SIGTERM)

    def run(self) -> Outcome:
        """Start the fleet and stay until it has ended; nothing of it is left then."""
        for name in self._specs:
            self._run.rotate_log(name)
        with signals.noted(self._signals):
            try:
                self._take(events.Began())
                while self._code is None:
                    self._turn()
            finally:
                self._last_resort()
                self._registrar.close()
                self._link.close()
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
        for name in tuple(self._unplaced):
            self._placed(name)
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
                self._planner.repick(name)
                self._specs |= {spec.name: spec for spec in self._planner.own()}  # others may name its port
            case events.Probe(name) if name in self._unplaced:
                return events.Answered(name, False)
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
            case events.Declare():
                self._link.start(self._controller_urls())
                self._link.declare(self._fleet.slots)
            case events.AskDrain(name, generation):
                self._link.ask_drain(name, generation, self._specs[name].url, self._router_url())
            case events.Forget(name):
                self._forget(name)
            case events.Ready():
                self._remember()
                self._publish()
                self._view.ready(self._record())
            case events.Finish(code):
                self._code = code
        return None

    def _start(self, name: str) -> events.Event | None:
        try:
            spec = self._plan(name)
            if spec.settings is not None and spec.settings_file is not None:
                self._run.write_settings(spec.settings_file, spec.settings)
            child = self._launcher.start(spec, self._run.log_file(name))
        except (FleetError, OSError) as error:
            return events.Exited(name, None, str(error))
        self._running[name] = child
        self._pids.pop(name, None)
        self._unplaced.add(name)
        self._placed(name)
        self._publish()
        return None

    def _placed(self, name: str) -> None:
        """Where it runs is known now: at once here, after a while on a cluster."""
        child = self._running[name]
        if child.spec is None:
            return
        self._unplaced.discard(name)
        self._specs[name] = child.spec
        if child.id is not None:
            self._pids[name] = child.id
        self._registrar.began(child.spec, child.pid, self._controller_urls())
        log.event("child.start", child=name, pid=child.pid, node=child.node)

    def _plan(self, name: str) -> ProcessSpec:
        """How to start it now; an instance's role and GPUs may be others than last time."""
        child = self._fleet.children[name]
        if child.kind == "instance":
            gpus = self._fleet.gpus.visible(name)
            self._specs[name] = self._planner.instance(name, role_of(child), gpus)
            if self._verbose and name not in self._followers:
                self._followers[name] = logs.Follower(self._run.log_file(name))
        return self._specs[name]

    def _forget(self, name: str) -> None:
        self._planner.forget(name)
        for known in (self._specs, self._pids, self._since, self._followers):
            known.pop(name, None)

    def _controller_urls(self) -> list[str]:
        return [spec.url for spec in self._specs.values() if spec.kind == "controller"]

    def _router_url(self) -> str | None:
        return next((spec.admin_url or spec.url for spec in self._specs.values() if spec.kind == "router"), None)

    def _bury(self, name: str) -> events.Exited:
        self._registrar.ended(name)
        self._unplaced.discard(name)
        child = self._running.pop(name)
        self._link.ended(name, child.pid)
        code = child.bury()
        lines = logs.tail(self._run.log_file(name))
        if self._fleet.children[name].was_ready:  # what it said long before its end explains nothing
            lines = lines[-limits.LOG_END_LINES :]
        picked = logs.why(lines)
        log.event("child.exit", child=name, pid=child.pid, code=code)
        reason = child.reason or (logs.summary(picked) if code > 0 else "")
        return events.Exited(name, code, reason, logs.port_taken(picked))

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
        stop_s = fleet.rules.drain_s + fleet.rules.stop_s
        gpus = fleet.gpus
        each: dict[str, int] = {role: fleet.gpus_of(role) for role in ROLES} if gpus.managed else {}
        return FleetRecord(
            self._run.folder.name, self._model, self._boot, self._me, fleet.phase, stop_s, records,
            fleet.reason, self._lines, fleet.revision, fleet.slots, fleet.rules.roles_fixed,
            GpuRecord(len(gpus.all), len(gpus.free), each) if gpus.managed else None,
        )  # fmt: skip

    def _process_record(self, child: Child) -> ProcessRecord:
        name, spec, running = child.name, self._specs.get(child.name), self._running.get(child.name)
        state, since = self._since.get(name, ("", 0.0))
        if state != child.state:
            since = time.time()
            self._since[name] = (child.state, since)
        tree, left = (running.tree, running.leftovers) if running is not None else (set(), set())
        return ProcessRecord(
            name, child.kind, child.role or child.kind, "" if spec is None else spec.url, child.state, since,
            str(self._run.log_file(name)), self._pids.get(name), tuple(sorted(tree)),
            tuple(sorted(left, key=lambda one: one.path)), None if spec is None else spec.tmp,
            child.ordered, child.note, "" if running is None else running.node, (spec and spec.admin_url) or "",
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
