"""A FleetConfig on a cluster: controllers and router stay beside the supervisor, instances go to the nodes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vllm_fleet.config.fleet import FleetConfig
from vllm_fleet.core import log
from vllm_fleet.core.errors import Busy, ConfigError
from vllm_fleet.launcher import plan, preflight
from vllm_fleet.launcher.connectors import side_port_name, side_ports
from vllm_fleet.launcher.gpus import Gpus
from vllm_fleet.launcher.hosts import late
from vllm_fleet.launcher.hosts.contract import Handle, Launcher
from vllm_fleet.launcher.hosts.placement import Ask
from vllm_fleet.launcher.hosts.ray import TOKEN_NAME, Cluster, RayLauncher, connect
from vllm_fleet.launcher.machine import Machine
from vllm_fleet.launcher.rundir import RunDir
from vllm_fleet.launcher.spec import ProcessSpec
from vllm_fleet.net import sockets
from vllm_fleet.wire.control import Slot
from vllm_fleet.wire.names import Role


class MixedLauncher:
    """Starts a process on the cluster if its spec asks anything of a node, else here. See ``contract.Launcher``."""

    def __init__(self, here: Launcher, cluster: Launcher) -> None:
        self._here, self._cluster = here, cluster

    def start(self, spec: ProcessSpec, log_file: Path) -> Handle:
        return (self._here if spec.needs is None else self._cluster).start(spec, log_file)

    def close(self) -> None:
        self._cluster.close()
        self._here.close()


class ClusterPlanner:
    """Plans with words for what is only known on a node. See ``planner.Planner``."""

    def __init__(self, config: FleetConfig, machine: Machine, run: RunDir) -> None:
        """Chooses the ports of controllers and router; ``run`` is emptied."""
        plan.check_vllm_args(config)
        self.gpus = Gpus()  # Ray gives them out
        nobody = config.model_copy(update={"prefill": 0, "decode": 0, "both": 0})
        self.ports, self.fixed = preflight.choose_ports(nobody)
        run.prepare(())
        self._config, self._machine = config, machine
        self._place = plan.Place(str(run.token_file), str(run.settings_folder), str(run.state_folder), {})

    def first(self) -> tuple[Slot, ...]:
        return tuple(Slot(name, role) for name, role in plan.instance_names(self._config))

    def own(self) -> tuple[ProcessSpec, ...]:
        return plan.plan_own(self._config, self._machine, self._place, self.ports)

    def instance(self, name: str, role: Role, gpus: str | None) -> ProcessSpec:
        config = self._config
        fabric = config.fabric.model_copy(update={"host": late.HOST})
        cores = max(1, int(config.cluster.cpus)) * (config.prefill + config.decode + config.both)
        there = replace(self._machine, python=late.PYTHON, cores=cores, gpus=(), environ={}, cache=late.CACHE)
        place = replace(
            self._place, token_file=f"{late.FOLDER}/{TOKEN_NAME}", tmp={name: late.FOLDER}, instance_host=late.HOST
        )
        ports: dict[str, int | str] = {**self.ports, name: late.PORT, side_port_name(name, 0): late.SIDE}
        spec = plan.plan_instance(config.model_copy(update={"fabric": fabric}), there, place, ports, name, role, None)
        env = {"VLLM_HOST_IP": late.HOST, **spec.env}
        sides = side_ports(config, role, plan.gpus_each(config, role))
        return replace(spec, env=env, needs=needs(config, self._machine, role), sides=sides)

    def repick(self, name: str) -> None:
        if name in self.ports:
            preflight.choose_again(self.ports, name, self._config.fabric.host)

    def forget(self, name: str) -> None:
        """Its ports were its node's."""

    def gpus_of(self, role: Role) -> int:
        return plan.gpus_each(self._config, role)


def needs(config: FleetConfig, machine: Machine, role: Role) -> dict[str, float]:
    """What an instance of this role asks of its node, in Ray's words."""
    part = config.cluster
    by_role = {"prefill": part.prefill_resources, "decode": part.decode_resources}
    gpus = 0 if machine.cpu_build or "CUDA_VISIBLE_DEVICES" in config.env else plan.gpus_each(config, role)
    return {"CPU": part.cpus, "GPU": float(gpus), **part.resources, **by_role.get(role, {})}


def check(config: FleetConfig) -> None:
    """ConfigError when what is asked of nodes is no amount."""
    part = config.cluster
    for key in ("resources", "prefill_resources", "decode_resources"):
        for name, amount in getattr(part, key).items():
            if amount < 0 or name in ("CPU", "GPU"):
                raise ConfigError(
                    f"cluster.{key}: {name!r}: {amount:g} cannot be asked for; amounts are 0 or more, CPUs are "
                    "cluster.cpus, and GPUs are what the vLLM arguments say"
                )


def on_cluster(
    config: FleetConfig, machine: Machine, run: RunDir, here: Launcher
) -> tuple[FleetConfig, ClusterPlanner, Launcher]:
    """Connect, and see that there is room. The configuration comes back with an address for the controllers that the
    nodes reach.

    Raises:
        ConfigError: no cluster answers there, or it has no room for the fleet.
    """
    assert config.cluster.address is not None
    check(config)
    cluster = connect(config.cluster.address)
    try:
        config = _reachable(config, cluster)
        planner = ClusterPlanner(config, machine, run)
        folders = (config.model,) if plan.is_folder(config.model) else ()
        launcher = RayLauncher(cluster, run.token_file, folders)
        asks = [Ask(name, role, needs(config, machine, role)) for name, role in plan.instance_names(config)]
        try:
            placed = launcher.plan(asks)
        except Busy as error:
            raise ConfigError(f"{error} (cluster.address {cluster.address})") from error
        log.event("cluster.placed", nodes=placed)
    except BaseException:
        cluster.close()
        raise
    return config, planner, MixedLauncher(here, launcher)


def _reachable(config: FleetConfig, cluster: Cluster) -> FleetConfig:
    """Controllers on loopback would be reached by nobody: they listen where this machine meets the cluster instead."""
    if not sockets.is_loopback(config.controller.host):
        return config
    head = next((node.address for node in cluster.nodes()), None)
    if head is None:
        raise ConfigError(f"the Ray cluster at {cluster.address} has no node")
    return config.model_copy(
        update={"controller": config.controller.model_copy(update={"host": sockets.local_address(head)})}
    )
