"""``vllm-fleet config explain``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import typer

from vllm_fleet.cli.flags import Flags
from vllm_fleet.config.explain import explain
from vllm_fleet.config.load import load, process_environment


def run(file: Path | None, flags: Flags, *, as_json: bool) -> None:
    """Print each setting with its value and its origin."""
    lines = explain(load(file, environ=process_environment(), flags=flags))
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(line) for line in lines], indent=2))
        return
    width = max(len(line.key) for line in lines)
    value = min(40, max(len(line.value) for line in lines))
    for line in lines:
        typer.echo(f"{line.key.ljust(width)}  {line.value.ljust(value)}  {line.origin}")
