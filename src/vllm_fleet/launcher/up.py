"""One fleet from a FleetConfig to its end, in this process."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping

from vllm_fleet.config.fleet import FleetConfig
from vllm_fleet.config.upstream import names
from vllm_fleet.core import limits, log
from vllm_fleet.core.errors import Busy, ConfigError, Corrupt
from vllm_fleet.launcher import connectors, machine, plan, preflight, record
from vllm_fleet.launcher.fleet import Rules
from vllm_fleet.launcher.hosts import ray
from vllm_fleet.launcher.hosts.cluster import ClusterPlanner, on_cluster
from vllm_fleet.launcher.hosts.contract import Launcher
from vllm_fleet.launcher.hosts.local import LocalLauncher
from vllm_fleet.launcher.planner import FleetPlanner
from vllm_fleet.launcher.rundir import RunDir, home
from vllm_fleet.launcher.supervisor import Supervisor
from vllm_fleet.launcher.view import Outcome, View

SUPERVISOR = "supervisor"
"""Name of the supervisor's own log."""
_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")


def check(config: FleetConfig, environ: Mapping[str, str]) -> machine.Machine:
    """Everything that can be known to be wrong before a process starts, but for ports; ConfigError says what."""
    here = config.cluster.address is None
    if here:
        preflight.check_model(config.model)
    plan.check_vllm_args(config)
    facts = machine.look(environ)
    connectors.check(config, facts)
    if here:
        plan.gpus_of_all(config, facts)
    else:
        ray.check_installed()
    return facts


def run_folder(name: str, environ: Mapping[str, str]) -> RunDir:
    """The run folder of the fleet of this name; ConfigError when no fleet can have it."""
    if not _NAME.fullmatch(name) or len(name) > limits.NAME_LEN_MAX:
        raise ConfigError(f"{name!r} is no fleet's name: small letters, digits and '-', at most {limits.NAME_LEN_MAX}")
    return RunDir(home(environ) / name)


def up(config: FleetConfig, environ: Mapping[str, str], view: View, *, verbose: bool = False) -> Outcome:
    """Run the fleet until it is asked to stop or fails to start.

    Raises:
        ConfigError: a setting is wrong; nothing was started.
        Busy: a fleet of this name runs already.
    """
    facts = check(config, environ)
    run = run_folder(config.name, environ)
    run.acquire()
    try:
        refuse_orphans(run)
        with log.to_file(run.log_file(SUPERVISOR)), contextlib.ExitStack() as stack:
            planner: FleetPlanner | ClusterPlanner
            launcher: Launcher = LocalLauncher(environ)
            if config.cluster.address is None:
                planner = FleetPlanner(config, facts, run)
            else:
                config, planner, launcher = on_cluster(config, facts, run, launcher)
            stack.callback(launcher.close)
            supervisor = Supervisor(
                run, planner, planner.fixed, rules_of(config), plan.served_name(config), environ, view,
                verbose=verbose, launcher=launcher,
            )  # fmt: skip
            outcome = supervisor.run()
        run.clear(keep_record=outcome.code != 0)
        return outcome
    finally:
        run.release()


def rules_of(config: FleetConfig) -> Rules:
    """What the settings say about starting, stopping and leaving."""
    part = config.launcher
    return Rules(
        part.ready_s,
        part.stop_s,
        part.drain_s,
        part.restarts_max,
        part.restart_window_s,
        quiet_s=max(Rules.quiet_s, 2 * config.controller.heartbeat_s + 0.5),
        held_s=config.handoff.lease_s,
        roles_fixed="fleet" not in names(config),
    )


def refuse_orphans(run: RunDir) -> None:
    """Busy when processes of an earlier run, whose supervisor was killed, still run."""
    try:
        left = record.read_record(run)
    except Corrupt:
        return  # of another version; nothing can be known from it
    if left is not None and left.living():
        raise Busy(
            f"the supervisor of fleet '{left.fleet}' was killed but {len(left.living())} of its processes still run; "
            f"stop them first: vllm-fleet down --name {left.fleet}"
        )
