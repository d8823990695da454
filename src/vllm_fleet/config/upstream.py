"""vLLM's own connectors that a fleet can use instead of ours or beside it, and which choices cannot work.

Read off vLLM 0.32; what was run and where is in docs/connectors.md. What depends on the machine is checked in
launcher.connectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vllm_fleet.config.fleet import ConnectorName, FleetConfig
from vllm_fleet.core.errors import ConfigError

LAUNCHER_SETS = ("VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_NIXL_SIDE_CHANNEL_PORT", "VLLM_MOONCAKE_BOOTSTRAP_PORT")
"""Variables with another value in each instance: ``env``, which every instance gets, cannot hold them."""


@dataclass(frozen=True)
class Upstream:
    """One connector that comes with vLLM."""

    vllm_name: str
    hands_over: bool
    """Whether a prefill instance hands KV to a decode instance through it; else it keeps KV for its own instance."""
    module: str | None
    """What must be importable for it."""
    install: str = ""
    no_cpu: str = ""
    """Why it does not run with vLLM's CPU build; empty: it does."""
    no_router: str = ""
    """Why our router cannot hand requests over through it; empty: it can."""


UPSTREAM: Mapping[ConnectorName, Upstream] = {
    "nixl": Upstream("NixlConnector", True, "nixl", "nixl"),
    "mooncake": Upstream(
        "MooncakeConnector",
        True,
        "mooncake",
        "mooncake-transfer-engine",
        no_cpu="vLLM's MooncakeConnector asks torch for an accelerator device",
        no_router="MooncakeConnector wants both instances asked together, with its own keys",
    ),
    "offloading": Upstream(
        "OffloadingConnector", False, None, no_cpu="vLLM's OffloadingConnector copies from GPUs only (CUDA, ROCm, XPU)"
    ),
    "lmcache": Upstream(
        "LMCacheMPConnector", False, "lmcache", "lmcache", no_cpu="vLLM's LMCacheMPConnector records CUDA events"
    ),
}


def names(config: FleetConfig) -> tuple[ConnectorName, ...]:
    """The connectors inside each instance, in the order in which they are asked for KV."""
    part = config.connector
    return part.inside if part.kind == "multi" else (part.kind,)


def hands_over(name: ConnectorName) -> bool:
    """Whether a prefill instance can hand KV to a decode instance through this connector."""
    return name == "fleet" or UPSTREAM[name].hands_over


def check_connector(config: FleetConfig) -> None:
    """ConfigError, one sentence, when the choice of connectors can work on no machine."""
    _check_inside(config)
    _check_roles(config)
    _check_extra(config)
    for variable in LAUNCHER_SETS:
        if variable in config.env:
            raise ConfigError(f"env must not hold {variable}: the launcher gives each instance a value of its own")


def _check_inside(config: FleetConfig) -> None:
    kind, inside = config.connector.kind, config.connector.inside
    if kind != "multi":
        if inside:
            raise ConfigError(f"connector.inside is for kind 'multi', but connector.kind is '{kind}'")
        return
    if not inside:
        raise ConfigError("connector.inside is empty; kind 'multi' needs it, for instance [fleet, offloading]")
    twice = sorted(name for name in set(inside) if inside.count(name) > 1)
    if twice:
        raise ConfigError(f"connector.inside names '{twice[0]}' twice")
    handing = [name for name in inside if hands_over(name)]
    if len(handing) > 1:
        raise ConfigError(
            f"connector.inside: '{handing[0]}' and '{handing[1]}' both hand KV over and would write the same keys of "
            "kv_transfer_params, at which vLLM's engine dies; keep one"
        )


def _check_roles(config: FleetConfig) -> None:
    if not config.prefill and not config.decode:
        return
    inside = names(config)
    roles = f"prefill is {config.prefill} and decode is {config.decode}"
    if not any(hands_over(name) for name in inside):
        keeps = " and ".join(f"'{name}'" for name in inside)
        raise ConfigError(
            f"{roles}, but connector {keeps} only keeps KV for its own instance and hands none over; use 'both' "
            f"instances, or connector.kind 'multi' with inside [fleet, {', '.join(inside)}]"
        )
    for name in inside:
        if name != "fleet" and UPSTREAM[name].no_router:
            raise ConfigError(
                f"{roles}, but the router does not hand over through connector '{name}' yet "
                f"({UPSTREAM[name].no_router}), so every prompt would be computed twice; use connector.kind 'fleet' or "
                "'nixl', or 'both' instances"
            )


def _check_extra(config: FleetConfig) -> None:
    extra, kind = config.connector.extra, config.connector.kind
    if kind == "multi":
        for name, value in extra.items():
            if name not in config.connector.inside:
                raise ConfigError(f"connector.extra.{name}: with kind 'multi' the keys are names from connector.inside")
            if not isinstance(value, dict):
                raise ConfigError(f"connector.extra.{name}: expected a mapping, the settings of '{name}'")
    if "fleet" in names(config) and extra_of(config, "fleet"):
        raise ConfigError("connector.extra: our own connector's settings are the keys under 'handoff' and 'fabric'")
    if "offloading" in names(config):
        given = extra_of(config, "offloading")
        if not given.get("cpu_bytes_to_use") and "spec_name" not in given:
            where = "connector.extra.offloading" if kind == "multi" else "connector.extra"
            raise ConfigError(
                f"{where}.cpu_bytes_to_use is not set: bytes of host memory that each instance keeps KV in, for "
                "instance 8589934592"
            )


def extra_of(config: FleetConfig, name: ConnectorName) -> dict[str, object]:
    """What ``connector.extra`` says for one of ``names(config)``."""
    extra = config.connector.extra
    given = extra.get(name, {}) if config.connector.kind == "multi" else extra
    return dict(given) if isinstance(given, dict) else {}
