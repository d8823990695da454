"""The vLLM plugin: the only part of the project that imports vLLM, and only when FleetConnector is asked for."""

from __future__ import annotations

from typing import Any

__all__ = ["FleetConnector"]


def __getattr__(name: str) -> Any:
    if name == "FleetConnector":
        from vllm_fleet.connector.connector import FleetConnector

        return FleetConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
