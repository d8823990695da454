"""``vllm-fleet down``."""

from __future__ import annotations

import json
import sys

import typer

from vllm_fleet.cli.progress import Live, Plain
from vllm_fleet.config.load import process_environment
from vllm_fleet.launcher import down as launcher
from vllm_fleet.launcher.up import run_folder


def run(name: str, timeout_s: float | None, *, as_json: bool) -> None:
    """Stop the fleet, show how that goes, and say so."""
    folder = run_folder(name, process_environment())
    view = Live(lambda record: None) if sys.stderr.isatty() else None
    if view is None:
        said = launcher.down(folder, timeout_s, Plain(lambda record: None).follow)
    else:
        with view:
            said = launcher.down(folder, timeout_s, view.follow)
    typer.echo(json.dumps({"fleet": name, "said": said}) if as_json else said)
