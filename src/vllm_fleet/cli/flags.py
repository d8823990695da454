"""The flags that ``up`` and ``config explain`` share, as dotted keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_fleet.core.errors import ConfigError

Flags = dict[str, tuple[str, Any]]
"""Dotted key -> (flag as typed, value)."""


def collect(
    model: str | None, prefill: int | None, decode: int | None, both: int | None, vllm_arg: Sequence[str] | None,
    env: Sequence[str] | None, name: str | None, router_port: int | None, host: str | None,
    transport: Sequence[str] | None, cluster: str | None = None, workers: int | None = None,
) -> Flags:  # fmt: skip
    """What was given; flags that were not typed are absent."""
    flags: Flags = {}
    for key, flag, value in (
        ("model", "--model", model),
        ("prefill", "--prefill", prefill),
        ("decode", "--decode", decode),
        ("both", "--both", both),
        ("name", "--name", name),
        ("router.port", "--router-port", router_port),
        ("router.host", "--host", host),
        ("router.workers", "--workers", workers),
        ("vllm_args", "--vllm-arg", vllm_arg or None),
        ("cluster.address", "--cluster", cluster),
        ("fabric.transports", "--transport", transport or None),
    ):
        if value is not None:
            flags[key] = (flag, value)
    for text in env or ():
        variable, equals, value = text.partition("=")
        if not variable or not equals:
            raise ConfigError(f"--env: expected NAME=VALUE, found {text!r}")
        flags[f"env.{variable}"] = ("--env", value)
    return flags
