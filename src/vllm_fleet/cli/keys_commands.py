"""The flags of ``vllm-fleet keys``; what the commands do is in keys.py, which is imported when one runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

keys_app = typer.Typer(help="API keys of the fleet's clients.", no_args_is_help=True, rich_markup_mode=None)

FileFlag = Annotated[
    Path | None, typer.Option("--file", metavar="FILE", help="The file of keys; router.keys_file if not given.")
]
ConfigFlag = Annotated[Path | None, typer.Option("--config", "-c", metavar="FILE", help="The fleet's file.")]


@keys_app.command(epilog="Example: vllm-fleet keys add alice > alice.key")
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is, in metrics and logs.")],
    file: FileFlag = None,
    config: ConfigFlag = None,
) -> None:
    """Draw a key and print it, this once; the file keeps its hash."""
    from vllm_fleet.cli import keys as command

    command.add(file, config, name)


@keys_app.command("list")
def show(
    file: FileFlag = None,
    config: ConfigFlag = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the names of the keys."""
    from vllm_fleet.cli import keys as command

    command.show(file, config, as_json=json)


@keys_app.command()
def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose key is to go.")],
    file: FileFlag = None,
    config: ConfigFlag = None,
) -> None:
    """Forget a key: the router refuses it within a second."""
    from vllm_fleet.cli import keys as command

    command.revoke(file, config, name)
