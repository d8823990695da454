"""``vllm-fleet logs``."""

from __future__ import annotations

import time

import typer

from vllm_fleet.config.load import process_environment
from vllm_fleet.core.errors import FleetError
from vllm_fleet.launcher.logs import Follower
from vllm_fleet.launcher.up import run_folder

TURN_S = 0.2


def run(name: str, process: str, *, follow: bool) -> None:
    """Print one process's log, and what is added to it until Ctrl-C."""
    folder = run_folder(name, process_environment())
    there = sorted(file.stem for file in folder.logs_folder.glob("*.log"))
    if process not in there:
        others = f"there are: {', '.join(there)}" if there else f"there are none in {folder.logs_folder}"
        raise FleetError(f"there is no log of '{process}' in fleet '{name}'; {others}")
    follower = Follower(folder.log_file(process))
    try:
        while True:
            lines = follower.lines()
            for line in lines:
                typer.echo(line)
            if not lines:
                if not follow:
                    break
                time.sleep(TURN_S)
        rest = follower.rest()
        if rest:
            typer.echo(rest)
    except KeyboardInterrupt:
        pass  # how one stops to follow
