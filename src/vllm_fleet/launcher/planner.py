"""Plans of one fleet on one machine, for processes that come and go: ports, folders, GPUs."""

from __future__ import annotations

from typing import Protocol

from vllm_fleet.config.fleet import FleetConfig
from vllm_fleet.launcher import plan, preflight
from vllm_fleet.launcher.gpus import Gpus
from vllm_fleet.launcher.machine import Machine
from vllm_fleet.launcher.rundir import RunDir
from vllm_fleet.launcher.spec import ProcessSpec
from vllm_fleet.wire.control import Slot
from vllm_fleet.wire.names import Role


class Planner(Protocol):
    """What a supervisor needs to start a process."""

    gpus: Gpus
    """All, and free: instances take theirs when they start."""

    def first(self) -> tuple[Slot, ...]:
        """The instances of the first start."""

    def own(self) -> tuple[ProcessSpec, ...]:
        """Controllers and router."""

    def instance(self, name: str, role: Role, gpus: str | None) -> ProcessSpec:
        """An instance, with the ports it had before where it was planned before."""

    def repick(self, name: str) -> None:
        """A port of this process was taken: it gets others."""

    def forget(self, name: str) -> None:
        """Nothing of this instance runs any more: its ports are free."""

    def gpus_of(self, role: Role) -> int:
        """How many an instance of this role gets."""


class FleetPlanner:
    """The plans of a FleetConfig. See Planner."""

    def __init__(self, config: FleetConfig, machine: Machine, run: RunDir) -> None:
        """Chooses the ports of the first start; ``run`` is emptied.

        Raises:
            ConfigError: a chosen port is taken, or the machine has too few GPUs.
        """
        plan.check_vllm_args(config)
        given = plan.gpus_of_all(config, machine)
        self.gpus = Gpus(given.all, given.islands)
        self._config, self._machine, self._run = config, machine, run
        self.ports, self.fixed = preflight.choose_ports(config)
        self._tmp = run.prepare(name for name, _ in plan.instance_names(config))
        folders = (str(run.token_file), str(run.settings_folder), str(run.state_folder))
        self._place = plan.Place(*folders, self._tmp, tmp_folder=str(run.tmp_folder))

    def first(self) -> tuple[Slot, ...]:
        return tuple(Slot(name, role) for name, role in plan.instance_names(self._config))

    def own(self) -> tuple[ProcessSpec, ...]:
        return plan.plan_own(self._config, self._machine, self._place, self.ports)

    def instance(self, name: str, role: Role, gpus: str | None) -> ProcessSpec:
        if name not in self.ports:
            preflight.add_ports(self.ports, self._config, name, role)
        if name not in self._tmp:
            self._tmp[name] = self._run.make_tmp(name)
        return plan.plan_instance(self._config, self._machine, self._place, self.ports, name, role, gpus)

    def repick(self, name: str) -> None:
        preflight.choose_again(self.ports, name, self._config.fabric.host)

    def forget(self, name: str) -> None:
        preflight.drop_ports(self.ports, name)
        self._tmp.pop(name, None)

    def gpus_of(self, role: Role) -> int:
        return plan.gpus_each(self._config, role)
