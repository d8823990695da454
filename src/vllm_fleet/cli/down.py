"""``vllm-fleet down``."""

from __future__ import annotations

import typer

from vllm_fleet.config.load import process_environment
from vllm_fleet.launcher import down as launcher
from vllm_fleet.launcher.up import run_folder


def run(name: str) -> None:
    """Stop the fleet and say so."""
    typer.echo(launcher.down(run_folder(name, process_environment())))
