"""FleetConfig and the facts of a machine -> the processes to start. Pure: no file, clock or socket."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from vllm_fleet.config.connector import ConnectorSettings, FabricFaults
from vllm_fleet.config.fleet import FaultsConfig, FleetConfig
from vllm_fleet.core.errors import ConfigError
from vllm_fleet.launcher import connectors, kv_events
from vllm_fleet.launcher.gpus import Gpus, check_enough
from vllm_fleet.launcher.machine import Machine
from vllm_fleet.launcher.router_settings import ROUTER_ADMIN, router_settings
from vllm_fleet.launcher.spec import Kind, ProcessSpec
from vllm_fleet.wire.names import Role

INSTANCE_HOST = "127.0.0.1"
OWNED = {
    "--model": "the key 'model' sets it",
    "--port": "the launcher picks a free port",
    "--host": "instances listen on loopback, behind the router",
    "--uds": "instances listen on loopback, behind the router",
    "--headless": "every instance of a fleet has its own server",
    "--ssl-keyfile": "instances listen on loopback, behind the router",
    "--ssl-certfile": "instances listen on loopback, behind the router",
    "--kv-transfer-config": "the keys under 'connector', 'handoff' and 'fabric' set it",
}
"""vLLM arguments that are ours to give, and why."""
DATA_PARALLEL = ("-dp", "--data-parallel-size")


@dataclass(frozen=True)
class Place:
    """Paths inside the run folder."""

    token_file: str
    settings_folder: str
    state_folder: str
    tmp: Mapping[str, str]
    """Folder for temporary files of each instance."""
    instance_host: str = INSTANCE_HOST
    tmp_folder: str = ""


def instance_names(config: FleetConfig) -> list[tuple[str, Role]]:
    """Name and role of every instance, in the order of their start."""
    counts: tuple[tuple[Role, int], ...] = (
        ("prefill", config.prefill), ("decode", config.decode), ("both", config.both),
    )  # fmt: skip
    return [(f"{role}-{index}", role) for role, count in counts for index in range(count)]


def controller_names(config: FleetConfig) -> list[str]:
    """Names of the controllers, of which one leads."""
    replicas = config.controller.replicas
    return ["controller"] if replicas == 1 else [f"controller-{index}" for index in range(replicas)]


def served_name(config: FleetConfig) -> str:
    """The model name clients use: the one given, else the last part of a folder's path, else the model's own."""
    from_args = option(config.vllm_args, "--served-model-name")
    if from_args is not None:
        return from_args
    if config.served_model_name is not None:
        return config.served_model_name
    return PurePosixPath(config.model).name if is_folder(config.model) else config.model


def is_folder(model: str) -> bool:
    """Whether the (resolved) model is a path rather than a name on Hugging Face."""
    return model.startswith("/")


def plan(config: FleetConfig, machine: Machine, place: Place, ports: Mapping[str, int]) -> tuple[ProcessSpec, ...]:
    """Every process of the fleet: controller, router, then instances. ``ports`` holds one for each name.

    Raises:
        ConfigError: ``vllm_args`` holds what the launcher must choose, or the machine has too few GPUs.
    """
    check_vllm_args(config)
    given = gpus_of_all(config, machine)
    names = instance_names(config)
    return (
        *plan_own(config, machine, place, ports),
        *(plan_instance(config, machine, place, ports, name, role, given.visible(name)) for name, role in names),
    )


def plan_own(config: FleetConfig, machine: Machine, place: Place, ports: Mapping[str, int]) -> tuple[ProcessSpec, ...]:
    """The processes that are ours: controller and router."""
    controllers = [_controller(config, machine, place, name, ports[name]) for name in controller_names(config)]
    return (*controllers, _router(config, machine, place, ports))


def url(host: str, port: int | str, scheme: str = "http") -> str:
    """``http://host:port``, with brackets around an IPv6 address."""
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _controllers(config: FleetConfig, ports: Mapping[str, int | str]) -> str | tuple[str, ...]:
    urls = tuple(url(config.controller.host, ports[name]) for name in controller_names(config))
    return urls[0] if len(urls) == 1 else urls


def _controller(config: FleetConfig, machine: Machine, place: Place, name: str, port: int) -> ProcessSpec:
    part = config.controller
    settings: dict[str, Any] = {
        "fleet": config.name,
        "host": part.host,
        "port": port,
        "token_file": place.token_file,
        "heartbeat_s": part.heartbeat_s,
        "suspect_s": part.suspect_s,
        "lease_s": part.lease_s,
    }
    if part.store == "etcd":
        settings["etcd"] = part.etcd.model_dump(mode="json")
    else:
        settings["state_dir"] = place.state_folder
    return _own_process("controller", name, machine, place, settings, url(part.host, port))


def _router(config: FleetConfig, machine: Machine, place: Place, ports: Mapping[str, int]) -> ProcessSpec:
    settings = router_settings(config, ports, place.token_file, _controllers(config, ports), place.tmp_folder)
    part, admin = config.router, ports.get(ROUTER_ADMIN)
    address = url(part.host, ports["router"], "http" if part.tls.cert_file is None else "https")
    made = _own_process("router", "router", machine, place, settings, address)
    return replace(made, admin_url=None if admin is None else url(part.admin_host, admin))


def _own_process(
    kind: Kind, name: str, machine: Machine, place: Place, settings: Mapping[str, Any], address: str
) -> ProcessSpec:
    file = f"{place.settings_folder}/{name}.json"
    argv = (machine.python, "-m", f"vllm_fleet.{kind}", "--settings", file)
    env = {"PYTHONUNBUFFERED": "1"}
    return ProcessSpec(name, kind, kind, argv, address, env, settings, file)


def plan_instance(
    config: FleetConfig,
    machine: Machine,
    place: Place,
    ports: Mapping[str, int | str],
    name: str,
    role: Role,
    gpus: str | None,
) -> ProcessSpec:
    """One instance. ``gpus``: its CUDA_VISIBLE_DEVICES; None leaves the environment alone."""
    address = url(place.instance_host, ports[name])
    connector = ConnectorSettings(
        fleet=config.name,
        name=name,
        role=role,
        token_file=place.token_file,
        url=address,
        controller=_controllers(config, ports),
        host=config.fabric.host,
        transports=config.fabric.transports,
        checksums=config.fabric.checksums,
        faults=_faults(config.fabric.faults),
        lease_s=config.handoff.lease_s,
        hold_s=config.handoff.hold_s,
        load_s=config.handoff.load_s,
        prefill_s=config.handoff.prefill_s,
        load=config.handoff.load,
    )
    transfer = connectors.transfer_config(config, role, connector)
    argv = [machine.python, "-m", "vllm.entrypoints.openai.api_server", "--model", config.model]
    argv += ["--host", place.instance_host, "--port", str(ports[name]), "--kv-transfer-config", json.dumps(transfer)]
    argv.append("--enable-prompt-tokens-details")
    if option(config.vllm_args, "--served-model-name") is None:
        argv += ["--served-model-name", served_name(config)]
    args = role_args(config, role)
    if machine.cpu_build and not _chooses_compilation(args):
        argv.append("--enforce-eager")
    tmp = place.tmp.get(name)
    argv += [*args, *kv_events.arguments(config, place.tmp_folder, tmp, name, option(args, *DATA_PARALLEL))]
    env = _instance_env(config, machine, gpus, tmp, connectors.environment(config, machine, name, ports))
    own_tmp = tmp if tmp is not None and env.get("TMPDIR") == tmp else None
    registered = connectors.fingerprint(config)
    return ProcessSpec(name, "instance", role, tuple(argv), address, env, tmp=own_tmp, fingerprint=registered)


def _faults(asked_for: FaultsConfig) -> FabricFaults | None:
    if not asked_for.rate and not asked_for.every:
        return None
    return FabricFaults(**asked_for.model_dump())


def _instance_env(
    config: FleetConfig, machine: Machine, gpus: str | None, tmp: str | None, connector: dict[str, str]
) -> dict[str, str]:
    unless_set = {
        "PYTHONUNBUFFERED": "1",
        "PYTHONHASHSEED": "0",  # equal prefix hashes in every instance
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # Instances have a TMPDIR of their own; what torch compiles at start-up should still be compiled only once.
        "TORCHINDUCTOR_CACHE_DIR": f"{machine.cache}/torchinductor",
    }
    if is_folder(config.model):
        unless_set["HF_HUB_OFFLINE"] = "1"
    if machine.cpu_build:
        instances = config.prefill + config.decode + config.both
        unless_set["VLLM_CPU_KVCACHE_SPACE"] = "1"
        unless_set["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        unless_set["OMP_NUM_THREADS"] = str(max(1, machine.cores // instances))
    env = {name: value for name, value in unless_set.items() if name not in machine.environ}
    if gpus is not None:
        env["CUDA_VISIBLE_DEVICES"] = gpus
        if "CUDA_DEVICE_ORDER" not in machine.environ:
            env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # the order of nvidia-smi, which told who is joined by NVLink
    if tmp is not None:
        env["TMPDIR"] = tmp
    return env | connector | config.env


def role_args(config: FleetConfig, role: Role) -> tuple[str, ...]:
    """The vLLM arguments of an instance with this role; a later one wins over an earlier."""
    further = {"prefill": config.prefill_args, "decode": config.decode_args}
    return (*config.vllm_args, *further.get(role, ()))


def check_vllm_args(config: FleetConfig) -> None:
    """ConfigError when an argument is ours, in any spelling vLLM accepts."""
    ours = OWNED | ({kv_events.ARGUMENT: "router.policy sets it"} if kv_events.wanted(config) else {})
    for setting in ("vllm_args", "prefill_args", "decode_args"):
        for arg in getattr(config, setting):
            name = _option_name(arg)
            for owned, reason in ours.items():
                # argparse takes any unique beginning of a name, and vLLM takes --a.b for a key inside a JSON argument
                if name.startswith("--") and len(name) > 2 and owned.startswith(name.partition(".")[0]):
                    raise ConfigError(f"{setting} must not hold {arg.partition('=')[0]}: {reason}")


def option(args: Sequence[str], *names: str) -> str | None:
    """The value of an option in vLLM arguments, the last one given; None when it is absent."""
    value = None
    for at, arg in enumerate(args):
        if _option_name(arg) in names:
            value = arg.partition("=")[2] if "=" in arg else (args[at + 1] if at + 1 < len(args) else None)
    return value


def _option_name(arg: str) -> str:
    name = arg.partition("=")[0]
    return name.replace("_", "-") if name.startswith("--") else name


def _chooses_compilation(args: Sequence[str]) -> bool:
    chosen = ("--enforce-eager", "--no-enforce-eager", "--compilation-config", "-cc", "-O", "--optimization-level")
    return any(_option_name(arg).partition(".")[0] in chosen or arg.startswith("-O") for arg in args)


def ranks(args: Sequence[str]) -> int:
    """GPUs one instance needs: tensor x pipeline x data parallel size."""
    total = 1
    sizes = (("-tp", "--tensor-parallel-size"), ("-pp", "--pipeline-parallel-size"), DATA_PARALLEL)
    for names in sizes:
        size = option(args, *names)
        if size is not None:
            if not size.isdecimal() or int(size) < 1:
                raise ConfigError(f"vllm_args: {names[1]} needs a whole number of at least 1, found {size!r}")
            total *= int(size)
    return total


def gpus_each(config: FleetConfig, role: Role) -> int:
    """GPUs of an instance with this role."""
    return ranks(role_args(config, role))


def gpus_of_all(config: FleetConfig, machine: Machine) -> Gpus:
    """The machine's GPUs, given to the instances of the first start in their order; those of nobody where there are
    none, or the user chose in ``env``.

    Raises:
        ConfigError: fewer GPUs than the instances need.
    """
    if machine.cpu_build or "CUDA_VISIBLE_DEVICES" in config.env:
        return Gpus()
    gpus = Gpus(machine.gpus, machine.islands)
    needed = {name: gpus_each(config, role) for name, role in instance_names(config)}
    check_enough(needed, gpus)
    for name, count in needed.items():
        gpus.take(name, count)
    return gpus
