"""A fleet whose every process is ours to kill, stop and start again: what fault tests and the storm run against.

The processes are those of the launcher's plan, started as the supervisor starts them, but nothing brings a dead one
back unless it is asked to. Every fault is proved before the call returns: a fault that did not happen is FaultMissed.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from vllm_fleet.bench.plain import scrape, total
from vllm_fleet.config.connector import bearer, read_token
from vllm_fleet.config.fleet import FleetConfig
from vllm_fleet.config.load import process_environment
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import FleetError
from vllm_fleet.launcher import plan, preflight, processes
from vllm_fleet.launcher.child import ChildProcess
from vllm_fleet.launcher.rundir import RunDir
from vllm_fleet.launcher.up import check
from vllm_fleet.net.control_client import ControlClient
from vllm_fleet.wire.control import Member

PROOF_S = 30.0
"""How soon after a signal every process of the victim must show its effect: giving GiBs back takes seconds on a busy
machine."""
CALL_S = 5.0
TURN_S = 0.05


class FaultMissed(FleetError):
    """A fault was ordered and did not happen: whatever the run found proves nothing."""


@dataclass(frozen=True)
class Proof:
    """What was done to an instance, and how that was seen."""

    kind: str
    victim: str
    at_s: float
    """On time.monotonic()'s clock, when it was proved."""
    seen: str


def process_state(pid: int) -> str:
    """The letter in /proc/PID/stat: T is stopped, Z a zombie; empty when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return ""
    return stat[stat.rindex(")") + 2]


class OwnFleet:
    """Controller, router and instances, by the names the launcher gives them. Any thread may fault any process."""

    def __init__(self, config: FleetConfig, home: Path) -> None:
        """Plan it; nothing runs yet. ``home`` gets the run folder."""
        self._environ = process_environment()
        facts = check(config, self._environ)
        self._run = RunDir(home / config.name)
        self._run.acquire()
        self.ports, _ = preflight.choose_ports(config)
        tmp = self._run.prepare(name for name, _ in plan.instance_names(config))
        run = self._run
        folders = (str(run.token_file), str(run.settings_folder), str(run.state_folder))
        place = plan.Place(*folders, tmp, tmp_folder=str(run.tmp_folder))
        self.specs = {spec.name: spec for spec in plan.plan(config, facts, place, self.ports)}
        self.token = read_token(run.token_file)
        self.router = self.specs["router"].url
        self.router_admin = self.specs["router"].admin_url or self.router
        """Where its metrics and timelines are."""
        controllers = [spec.url for spec in self.specs.values() if spec.kind == "controller"]
        self._control = ControlClient(controllers, bearer(self.token))
        self._ready_s = config.launcher.ready_s
        self._stop_s = config.launcher.stop_s
        self._children: dict[str, ChildProcess] = {}

    def instances(self, *roles: str) -> list[str]:
        """Names of the instances with one of these roles; without roles all."""
        specs = [spec for spec in self.specs.values() if spec.kind == "instance"]
        return [spec.name for spec in specs if not roles or spec.role in roles]

    def url(self, name: str) -> str:
        """Where a process answers."""
        return self.specs[name].url

    def log(self, name: str) -> str:
        """All that a process has said, over all its lives."""
        return self._run.log_file(name).read_text(errors="replace")

    def pids(self, name: str) -> set[int]:
        """The running processes of one name: the server, its engine, its workers."""
        child = self._children.get(name)
        if child is None:
            return set()
        child.remember(processes.table())
        return {each.pid for each in child.tree if processes.alive(each)}

    def members(self) -> dict[str, Member]:
        """The instances as the controller knows them."""
        snapshot = self._control.snapshot(Deadline.after(CALL_S, "bench.own_fleet.CALL_S"))
        return {member.name: member for member in snapshot.members}

    # Life --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start everything and wait until the router can use it.

        Raises:
            FleetError: a process ended or was not ready in time; the fleet is closed.
        """
        try:
            for name in self.specs:
                self.launch(name)
            self.wait_ready(self.instances())
        except BaseException:
            self.close()
            raise

    def launch(self, name: str) -> None:
        """Start one process, without waiting for it."""
        spec = self.specs[name]
        if spec.settings is not None and spec.settings_file is not None:
            self._run.write_settings(spec.settings_file, spec.settings)
        self._children[name] = ChildProcess(spec, self._run.log_file(name), self._environ)

    def wait_ready(self, names: Collection[str], not_lives: Collection[str] = ()) -> None:
        """Wait until the controller and the router hold all of ``names`` for ready.

        Args:
            not_lives: incarnations that do not count: those before a restart.
        """

        def ready() -> bool:
            for name in names:
                if self._children[name].poll():
                    raise FleetError(f"{name} has ended while it was waited for:\n{self.log(name)[-2000:]}")
            try:
                members, metrics = self.members(), scrape(self.router_admin)
            except (FleetError, OSError):
                return False  # they are starting
            good = {m.name for m in members.values() if m.state == "ready" and m.incarnation not in not_lives}
            known = sum(member.state == "ready" for member in members.values())
            return good.issuperset(names) and total(metrics, "vllm_fleet_router_instances", state="ready") >= known

        if not _within(self._ready_s, ready):
            raise FleetError(f"{', '.join(sorted(names))} were not ready within {self._ready_s:.0f} s")

    def close(self) -> None:
        """End every process and remove what they leave behind. Safe to call twice."""
        for child in self._children.values():
            child.remember(processes.table())
            child.signal_group(signal.SIGCONT)
            child.signal_group(signal.SIGTERM)
        _within(self._stop_s, lambda: all(child.poll() for child in self._children.values()))
        for child in self._children.values():
            child.signal_group(signal.SIGKILL)
            child.bury()
        self._children.clear()
        self._run.clear()
        self._run.release()

    # Faults ------------------------------------------------------------------------------------------------------

    def kill(self, name: str) -> Proof:
        """SIGKILL a process and all that it started."""
        pids = self.pids(name)
        if not pids:
            raise FaultMissed(f"{name} does not run, so it cannot be killed")
        child = self._children[name]
        victims = set(child.tree)
        child.signal_group(signal.SIGKILL)
        if not _within(PROOF_S, lambda: child.poll() and not any(map(processes.alive, victims))):
            raise FaultMissed(f"{name}: SIGKILL, but of processes {sorted(pids)} some still run")
        at_s = time.monotonic()
        child.bury()
        del self._children[name]  # its pid may be another's from now on
        return Proof("kill", name, at_s, f"processes {sorted(pids)} are gone")

    def restart(self, name: str) -> Proof:
        """Start a killed instance again under its name and wait until the fleet uses its new life."""
        before = self.members().get(name)
        old = before.incarnation if before is not None else ""
        self.launch(name)
        self.wait_ready([name], [old])
        now = self.members()[name].incarnation
        return Proof("restart", name, time.monotonic(), f"incarnation {old[:8] or '-'} -> {now[:8]}")

    def stop(self, name: str) -> Proof:
        """SIGSTOP a process and all that it started."""
        return self._signal(name, signal.SIGSTOP, "stop", lambda state: state == "T")

    def resume(self, name: str) -> Proof:
        """SIGCONT it."""
        return self._signal(name, signal.SIGCONT, "continue", lambda state: state not in ("T", "", "Z"))

    def _signal(self, name: str, signum: signal.Signals, kind: str, shows: Callable[[str], bool]) -> Proof:
        pids = self.pids(name)
        if not pids:
            raise FaultMissed(f"{name} does not run, so it gets no {signum.name}")
        self._children[name].signal_group(signum)
        if not _within(PROOF_S, lambda: all(shows(process_state(pid)) for pid in pids)):
            states = {pid: process_state(pid) for pid in sorted(pids)}
            raise FaultMissed(f"{name}: {signum.name}, but its processes are in the states {states}")
        states = {pid: process_state(pid) for pid in sorted(pids)}
        return Proof(kind, name, time.monotonic(), f"states {states}")


def _within(seconds: float, check: Callable[[], bool]) -> bool:
    """Whether ``check`` became true in time."""
    until = time.monotonic() + seconds
    while not check():
        if time.monotonic() >= until:
            return False
        time.sleep(TURN_S)
    return True
