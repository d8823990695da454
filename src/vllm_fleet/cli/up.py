"""``vllm-fleet up``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import typer

from vllm_fleet.cli.flags import Flags
from vllm_fleet.cli.progress import Live, Plain, table
from vllm_fleet.config.load import load, process_environment
from vllm_fleet.launcher.detach import up_detached
from vllm_fleet.launcher.record import FleetRecord
from vllm_fleet.launcher.status import Status
from vllm_fleet.launcher.up import up
from vllm_fleet.launcher.view import Outcome


def run(file: Path | None, flags: Flags, *, detach: bool, verbose: bool, as_json: bool) -> int:
    """Start the fleet; the exit code."""
    environ = process_environment()
    config = load(file, environ=environ, flags=flags).config

    def announce(record: FleetRecord) -> None:
        if as_json:
            states = {each.name: each.state for each in record.processes}
            typer.echo(json.dumps(Status(record, dict(states), ()).to_json(), indent=2))
        else:
            typer.echo(ready_text(record, detached=detach))

    live = sys.stderr.isatty() and not verbose
    view = Live(announce) if live else Plain(announce)
    with view:
        outcome = up_detached(config, environ, view) if detach else up(config, environ, view, verbose=verbose)
    if outcome.code:
        complain(outcome)
    return outcome.code


def complain(outcome: Outcome) -> None:
    """Say on standard error why the fleet failed: one sentence, then the lines of the log that matter."""
    typer.secho(outcome.reason, fg=typer.colors.RED, err=True)
    for line in outcome.lines:
        typer.echo(f"  {line}", err=True)
    if outcome.log:
        typer.echo(f"log: {outcome.log}", err=True)


def ready_text(record: FleetRecord, *, detached: bool) -> str:
    """The table, the router's URL and an example, for a fleet that is ready."""
    router = record.url("router")
    body = json.dumps({"model": record.model, "prompt": "Once upon a time", "max_tokens": 16})
    name = "" if record.fleet == "default" else f" --name {record.fleet}"
    ending = f"stop it with: vllm-fleet down{name}" if detached else "stop it with Ctrl-C"
    return "\n".join(
        (
            table(record, {each.name: each.state for each in record.processes}),
            "",
            f"ready: {router}/v1 ({ending})",
            "",
            f"  curl {router}/v1/completions -H 'Content-Type: application/json' \\",
            "    -d " + _quoted(body),
        )
    )


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
