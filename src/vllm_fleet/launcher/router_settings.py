"""What the router process is told. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_fleet.config.fleet import FleetConfig
from vllm_fleet.config.front import front_settings
from vllm_fleet.config.requests import request_settings
from vllm_fleet.launcher import kv_events

ROUTER_ADMIN = "router-admin"
"""Name of the port of the router's metrics and timelines, among the ports of processes."""


def router_settings(
    config: FleetConfig,
    ports: Mapping[str, int],
    token_file: str,
    controller: str | Sequence[str],
    tmp_folder: str,
) -> dict[str, Any]:
    """The content of its settings file (router/settings.py)."""
    return {
        "fleet": config.name,
        "host": config.router.host,
        "port": ports["router"],
        "token_file": token_file,
        "controller": controller,
        "workers": config.router.workers,
        "request_timeout_s": config.router.request_timeout_s,
        "handoff": config.router.handoff,
        "requests": request_settings(config.router),
        "policy": kv_events.router_settings(config, tmp_folder),
        "stop_s": config.launcher.drain_s,
        "front": front_settings(config.router, ports.get(ROUTER_ADMIN)),
    }
