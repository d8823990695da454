"""What is checked before anything starts, so that a wrong setting costs no half-started fleet."""

from __future__ import annotations

from pathlib import Path

from vllm_fleet.config.fleet import FleetConfig
from vllm_fleet.core.errors import ConfigError
from vllm_fleet.launcher.plan import INSTANCE_HOST, instance_names, is_folder
from vllm_fleet.net import sockets

MODEL_FILES = ("config.json", "params.json")
"""One of these is in every folder vLLM can load: Hugging Face's format, and Mistral's own."""


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
    for name, host, port in (
        ("router", config.router.host, config.router.port),
        ("controller", config.controller.host, config.controller.port),
    ):
        if port:
            if port in ports.values():
                raise ConfigError(f"{name}.port: {port} is also router.port; choose another, or 0 for a free one")
            sockets.listen(host, port, setting=f"{name}.port").close()
            ports[name] = port
            fixed.add(name)
    for name, host in (("router", config.router.host), ("controller", config.controller.host)):
        if name not in ports:
            ports[name] = _free(host, f"{name}.host", ports)
    for name, _ in instance_names(config):
        ports[name] = _free(INSTANCE_HOST, "instances", ports)
    return ports, frozenset(fixed)


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
