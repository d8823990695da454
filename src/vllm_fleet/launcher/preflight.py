"""What is checked before anything starts, so that a wrong setting costs no half-started fleet."""

from __future__ import annotations

import contextlib
from pathlib import Path

from vllm_fleet.config.fleet import FleetConfig
from vllm_fleet.core.errors import ConfigError
from vllm_fleet.launcher.connectors import side_port_name, side_ports
from vllm_fleet.launcher.plan import INSTANCE_HOST, controller_names, instance_names, is_folder, ranks, role_args
from vllm_fleet.launcher.router_settings import ROUTER_ADMIN
from vllm_fleet.net import sockets
from vllm_fleet.wire.names import Role

MODEL_FILES = ("config.json", "params.json")
"""One of these is in every folder vLLM can load: Hugging Face's format, and Mistral's own."""
PORT_MAX = 65_535
RANGE_TRIES_MAX = 200


def check_model(model: str) -> None:
    """ConfigError when ``model`` is a path (already resolved) that vLLM could not load."""
    if not is_folder(model):
        return
    path = Path(model)
    if path.is_file() and path.suffix == ".gguf":
        return
    if not path.exists():
        raise ConfigError(f"model: there is no folder {model}")
    if not path.is_dir():
        raise ConfigError(f"model: {model} is a file; name the folder that holds the model's config.json")
    if not any((path / name).is_file() for name in MODEL_FILES):
        raise ConfigError(f"model: {model} holds no config.json, so it is not a model's folder")


def choose_ports(config: FleetConfig) -> tuple[dict[str, int], frozenset[str]]:
    """A port for every process, and the names of those whose port the user chose.

    Raises:
        ConfigError: a chosen port is taken; names the setting.
    """
    ports: dict[str, int] = {}
    fixed: set[str] = set()
    controllers = controller_names(config)
    router = config.router
    own = [("router", "router.port", router.host, router.port)]
    own.append((ROUTER_ADMIN, "router.admin_port", router.admin_host, router.admin_port))
    for index, name in enumerate(controllers):
        first = config.controller.port
        own.append((name, "controller.port", config.controller.host, first + index if first else 0))
    for name, key, host, port in own:
        if port:
            if port > PORT_MAX:
                raise ConfigError(f"{key}: {len(controllers)} controllers need as many ports, up to {port}")
            if port in ports.values():
                other = next(used for known, used, _, _ in own if ports.get(known) == port)
                raise ConfigError(f"{key}: {port} is also {other}; choose another, or 0 for a free one")
            sockets.listen(host, port, setting=key).close()
            ports[name] = port
            fixed.add(name)
    for name, key, host, _ in own:
        if name not in ports:
            ports[name] = _free(host, key.replace("port", "host"), ports)
    for name, role in instance_names(config):
        add_ports(ports, config, name, role)
    return ports, frozenset(fixed)


def add_ports(ports: dict[str, int], config: FleetConfig, name: str, role: Role) -> None:
    """Free ports for one more instance."""
    ports[name] = _free(INSTANCE_HOST, "instances", ports)
    _lease_side(ports, name, config.fabric.host, side_ports(config, role, ranks(role_args(config, role))))


def drop_ports(ports: dict[str, int], name: str) -> None:
    """An instance's ports are free."""
    ports.pop(name, None)
    for side in [other for other in ports if other.startswith(side_port_name(name, 0)[:-1])]:
        del ports[side]


def choose_again(ports: dict[str, int], name: str, side_host: str) -> None:
    """Other ports for a process that found one of its own taken."""
    ports[name] = _free(INSTANCE_HOST, "instances", ports)
    count = sum(other.startswith(side_port_name(name, 0)[:-1]) for other in ports)
    _lease_side(ports, name, side_host, count)


def _lease_side(ports: dict[str, int], name: str, host: str, count: int) -> None:
    if count:
        first = _free_range(host, count, set(ports.values()))
        ports |= {side_port_name(name, index): first + index for index in range(count)}


def _free_range(host: str, count: int, taken: set[int]) -> int:
    """The first of ``count`` consecutive ports that are free now and not in ``taken``."""
    with contextlib.ExitStack() as held:
        for _ in range(RANGE_TRIES_MAX):
            # Each try holds its first port, so that the next one differs.
            first = held.enter_context(sockets.listen(host, 0, setting="fabric.host")).getsockname()[1]
            wanted = range(first, first + count)
            if wanted[-1] > PORT_MAX or not taken.isdisjoint(wanted):
                continue
            with contextlib.ExitStack() as probes, contextlib.suppress(ConfigError):
                for port in wanted[1:]:
                    probes.enter_context(sockets.listen(host, port, setting="fabric.host"))
                return int(first)
    raise ConfigError(f"connector: found no {count} consecutive free ports on {host} in {RANGE_TRIES_MAX} tries")


def _free(host: str, setting: str, taken: dict[str, int]) -> int:
    tried = []
    try:
        while True:  # each try holds its port, so that the next one differs; ends at the latest when none is free
            tried.append(sockets.listen(host, 0, setting=setting))
            port = int(tried[-1].getsockname()[1])
            if port not in taken.values():
                return port
    finally:
        for each in tried:
            each.close()
