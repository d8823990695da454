"""What vLLM is told about the KV connector of one instance: configuration, ports, environment. Pure.

Which connectors there are: config.upstream. Names and formulas are those of vLLM 0.32 (envs.py and
distributed/kv_transfer/kv_connector/v1), and of older versions where they differ and 0.32 ignores them.
"""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Mapping
from typing import Any

import msgspec

from vllm_fleet.config.connector import ConnectorSettings
from vllm_fleet.config.fleet import ConnectorName, FleetConfig
from vllm_fleet.config.upstream import UPSTREAM, check_connector, extra_of, names
from vllm_fleet.core.errors import ConfigError
from vllm_fleet.launcher.machine import Machine
from vllm_fleet.wire.control import UPSTREAM_CONNECTOR
from vllm_fleet.wire.names import Role

KV_ROLES: Mapping[str, str] = {"prefill": "kv_producer", "decode": "kv_consumer", "both": "kv_both"}
"""Whoever loads KV must not be a kv_producer: vLLM then frees blocks that a running step may still write (0.32,
v1/core/sched/scheduler.py, defer_block_free). With our connector everybody is kv_both: its role may change at any time.
"""

LOOPBACK_DEVICE = "lo"  # Linux
NIXL_LEASE_S_MIN = 6
"""NixlConnector renews every sixth of its lease, in whole seconds: a shorter one is renewed without a pause."""


def check(config: FleetConfig, machine: Machine) -> None:
    """ConfigError, one sentence, when the chosen connector cannot work, in general or on this machine."""
    check_connector(config)
    for name in names(config):
        if name == "fleet":
            continue
        upstream = UPSTREAM[name]
        if machine.cpu_build and upstream.no_cpu:
            raise ConfigError(
                f"connector '{name}' does not run with vLLM's CPU build: {upstream.no_cpu}; on this machine "
                "connector.kind can be 'fleet' or 'nixl'"
            )
        if upstream.module is not None and upstream.module not in machine.modules:
            raise ConfigError(
                f"connector '{name}' needs the Python module {upstream.module!r}, which is not installed; run: "
                f"pip install {upstream.install}"
            )


def side_ports(config: FleetConfig, role: Role, ranks: int) -> int:
    """Consecutive ports an instance needs beside its HTTP port.

    NixlConnector: one for each rank, as older versions listen on base + dp_rank * tp_size + tp_rank (0.32: on base + dp
    rank). MooncakeConnector: the bootstrap server of an instance that computes prompts.
    """
    inside = names(config)
    if "nixl" in inside:
        return ranks
    return 1 if "mooncake" in inside and role != "decode" else 0


def side_port_name(instance: str, index: int) -> str:
    """The name of one of them among the launcher's ports; no instance can be called so."""
    return f"{instance}/side/{index}"


def transfer_config(config: FleetConfig, role: Role, ours: ConnectorSettings) -> dict[str, Any]:
    """The value of --kv-transfer-config."""
    inside = names(config)
    if config.connector.kind != "multi":
        return _one(config, inside[0], role, ours) | {"kv_load_failure_policy": config.handoff.on_failure}
    children = [_one(config, name, role, ours) for name in inside]
    kv_roles = {child["kv_role"] for child in children}
    return {
        "kv_connector": "MultiConnector",
        # Beside a producer there may be a child that loads, and then the instance must not be a kv_producer.
        "kv_role": kv_roles.pop() if len(kv_roles) == 1 else "kv_both",
        "kv_load_failure_policy": config.handoff.on_failure,
        "kv_connector_extra_config": {"connectors": children},
    }


def _one(config: FleetConfig, name: ConnectorName, role: Role, ours: ConnectorSettings) -> dict[str, Any]:
    if name == "fleet":
        return {
            "kv_connector": "FleetConnector",
            "kv_connector_module_path": "vllm_fleet.connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": msgspec.to_builtins(ours),
        }
    upstream = UPSTREAM[name]
    return {
        "kv_connector": upstream.vllm_name,
        "kv_role": KV_ROLES[role] if upstream.hands_over else "kv_both",
        "kv_connector_extra_config": _defaults(config, name) | extra_of(config, name),
    }


def _defaults(config: FleetConfig, name: ConnectorName) -> dict[str, Any]:
    if name == "nixl":
        return {"kv_lease_duration": max(NIXL_LEASE_S_MIN, math.ceil(config.handoff.lease_s))}
    if name == "mooncake":  # one machine: loopback has no RDMA device, which is what the connector asks for by default
        return {"mooncake_protocol": "tcp"}
    return {}


def environment(config: FleetConfig, machine: Machine, instance: str, ports: Mapping[str, int | str]) -> dict[str, str]:
    """Variables for the connectors of one instance. What the launcher's own environment says goes over UCX_* and time
    limits, but not over ports."""
    inside = names(config)
    base = ports.get(side_port_name(instance, 0))
    fixed: dict[str, str] = {}
    unless_set: dict[str, str] = {}
    if "nixl" in inside:
        assert base is not None, f"no side port for {instance}"
        fixed = {"VLLM_NIXL_SIDE_CHANNEL_HOST": config.fabric.host, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(base)}
        # What versions before leases go by; 0.32 takes kv_lease_duration and says that it does not know this one.
        unless_set["VLLM_NIXL_ABORT_REQUEST_TIMEOUT"] = str(math.ceil(config.handoff.lease_s))
        if machine.cpu_build:
            unless_set["UCX_TLS"] = "self,sm,tcp"  # KV in host memory, peers on this machine
            if _is_loopback(config.fabric.host):
                unless_set["UCX_NET_DEVICES"] = LOOPBACK_DEVICE  # else UCX listens on every network device
    elif "mooncake" in inside:
        if base is not None:
            fixed["VLLM_MOONCAKE_BOOTSTRAP_PORT"] = str(base)
        unless_set["VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT"] = str(math.ceil(config.handoff.lease_s))
    return {name: value for name, value in unless_set.items() if name not in machine.environ} | fixed


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def fingerprint(config: FleetConfig) -> dict[str, str] | None:
    """What the supervisor registers for an instance with the controller; None where our connector, inside the
    instance, does that itself."""
    inside = names(config)
    if "fleet" in inside:
        return None
    return {UPSTREAM_CONNECTOR: "+".join(inside), "model": config.model[-200:]}
