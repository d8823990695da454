"""``vllm-fleet status``."""

from __future__ import annotations

import json

import typer

from vllm_fleet.cli.progress import table
from vllm_fleet.config.load import process_environment
from vllm_fleet.core import limits
from vllm_fleet.launcher.desired import counts
from vllm_fleet.launcher.status import status
from vllm_fleet.launcher.up import run_folder


def run(name: str, *, as_json: bool) -> None:
    """Print the fleet's processes."""
    found = status(run_folder(name, process_environment()))
    for remark in found.remarks:
        typer.secho(remark, fg=typer.colors.YELLOW, err=True)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
    else:
        typer.echo(f"fleet '{found.record.fleet}' serves {found.record.model} ({found.record.phase})")
        typer.echo(table(found.record, found.states))
        if found.record.admin_url() != found.record.url("router"):
            typer.echo(f"router's metrics: {found.record.admin_url()}/metrics")
        if found.record.desired:
            typer.echo("to be: " + ", ".join(f"{count} {role}" for role, count in counts(found.record.desired).items()))
        for each in found.record.processes:
            if each.note:
                typer.echo(f"{each.name} {each.note}")
        for name, peers in found.below.items():
            for peer, tokens in peers.items():
                much = "all prompts" if tokens >= limits.TOKENS_MAX else f"prompts of under {tokens} tokens"
                typer.echo(f"{name} computes {much} itself, sooner than it loads them from {peer}")
