"""``vllm-fleet``: the commands and their flags. A command imports what it needs when it runs: --help stays quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vllm_fleet import __version__
from vllm_fleet.cli.keys_commands import keys_app
from vllm_fleet.core.errors import ConfigError, FleetError

app = typer.Typer(
    name="vllm-fleet",
    help="Many vLLM instances as one service.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="What a fleet is configured to be.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(config_app, name="config")
bench_app = typer.Typer(help="How fast this machine moves KV.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench_app, name="bench")
app.add_typer(keys_app, name="keys")

ConfigFlag = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="The fleet's file; fleet.yaml of this folder if there is one."),
]
ModelFlag = Annotated[str | None, typer.Option("--model", help="Folder or Hugging Face name of the model.")]
PrefillFlag = Annotated[int | None, typer.Option("--prefill", metavar="N", help="Prefill instances.")]
DecodeFlag = Annotated[int | None, typer.Option("--decode", metavar="N", help="Decode instances.")]
BothFlag = Annotated[int | None, typer.Option("--both", metavar="N", help="Instances that do both.")]
VllmArgFlag = Annotated[
    list[str] | None,
    typer.Option(
        "--vllm-arg", metavar="ARG", help="One argument for every vLLM server: --vllm-arg=--max-model-len=512."
    ),
]
EnvFlag = Annotated[
    list[str] | None,
    typer.Option("--env", metavar="K=V", help="An environment variable for every vLLM server."),
]
NameFlag = Annotated[str | None, typer.Option("--name", help="Name of the fleet.")]
PortFlag = Annotated[
    int | None,
    typer.Option("--router-port", metavar="PORT", help="Port of the router; 0 picks a free one."),
]
HostFlag = Annotated[str | None, typer.Option("--host", help="Address the router listens on.")]
WorkersFlag = Annotated[
    int | None, typer.Option("--workers", metavar="N", min=1, help="Router processes that share its port.")
]
TransportFlag = Annotated[
    list[str] | None,
    typer.Option("--transport", help="A transport that may be used, best first; may be repeated."),
]
ClusterFlag = Annotated[
    str | None,
    typer.Option("--cluster", metavar="ADDRESS", help="A Ray cluster for the instances: ray://HOST:PORT, auto."),
]
RunningFlag = Annotated[str, typer.Option("--name", help="Name of the fleet.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON.")]
TimeoutFlag = Annotated[
    float, typer.Option("--timeout", metavar="S", min=0, help="Seconds to wait until it is done; 0: do not wait.")
]
TIMEOUT_S = 600.0


@app.command()
def up(
    config: ConfigFlag = None,
    model: ModelFlag = None,
    prefill: PrefillFlag = None,
    decode: DecodeFlag = None,
    both: BothFlag = None,
    vllm_arg: VllmArgFlag = None,
    env: EnvFlag = None,
    name: NameFlag = None,
    router_port: PortFlag = None,
    host: HostFlag = None,
    workers: WorkersFlag = None,
    transport: TransportFlag = None,
    cluster: ClusterFlag = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return when the fleet is ready.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what the processes write.")] = False,
    json: JsonFlag = False,
) -> None:
    """Start a fleet, and stop it on Ctrl-C."""
    from vllm_fleet.cli import flags
    from vllm_fleet.cli import up as command

    words = (model, prefill, decode, both, vllm_arg, env, name, router_port, host, transport, cluster, workers)
    given = flags.collect(*words)
    raise typer.Exit(command.run(config, given, detach=detach, verbose=verbose, as_json=json))


@app.command()
def status(name: RunningFlag = "default", json: JsonFlag = False) -> None:
    """Show what runs."""
    from vllm_fleet.cli import status as command

    command.run(name, as_json=json)


@app.command(epilog="Example: vllm-fleet down --timeout 5")
def down(
    name: RunningFlag = "default",
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout", metavar="S", min=0, help="Kill what still runs then; requests end before, if they can."
        ),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Stop a fleet and remove what it left: running requests end first (launcher.drain_s at most)."""
    from vllm_fleet.cli import down as command

    command.run(name, timeout, as_json=json)


@app.command(epilog="Example: vllm-fleet scale prefill=2 decode=3")
def scale(
    wanted: Annotated[list[str], typer.Argument(metavar="ROLE=N…", help="prefill=N, decode=N, both=N; others stay.")],
    name: RunningFlag = "default",
    timeout: TimeoutFlag = TIMEOUT_S,
    json: JsonFlag = False,
) -> None:
    """Start or stop instances of a fleet that serves; those that stop finish first what they have."""
    from vllm_fleet.cli import orders as command

    command.scale(name, wanted, timeout, as_json=json)


@app.command(epilog="Example: vllm-fleet role prefill-1 decode")
def role(
    instance: Annotated[str, typer.Argument(metavar="INSTANCE", help="An instance, as `status` names it.")],
    to: Annotated[str, typer.Argument(metavar="ROLE", help="prefill, decode or both.")],
    name: RunningFlag = "default",
    timeout: TimeoutFlag = TIMEOUT_S,
    json: JsonFlag = False,
) -> None:
    """Use an instance for something else, without a restart; what it has it finishes."""
    from vllm_fleet.cli import orders as command

    command.role(name, instance, to, timeout, as_json=json)


@app.command(epilog="Example: vllm-fleet drain decode-1")
def drain(
    instance: Annotated[str, typer.Argument(metavar="INSTANCE", help="An instance, as `status` names it.")],
    name: RunningFlag = "default",
    timeout: TimeoutFlag = TIMEOUT_S,
    json: JsonFlag = False,
) -> None:
    """Take one instance out for good: nothing new goes there, what it has it finishes, then it stops."""
    from vllm_fleet.cli import orders as command

    command.drain(name, instance, timeout, as_json=json)


@app.command(epilog="Example: vllm-fleet restart --rolling")
def restart(
    instances: Annotated[list[str] | None, typer.Argument(metavar="[INSTANCE…]", help="All, if none is named.")] = None,
    rolling: Annotated[
        bool, typer.Option("--rolling", help="One after the other, and never the last ready one of a role.")
    ] = False,
    name: RunningFlag = "default",
    timeout: TimeoutFlag = 4 * TIMEOUT_S,
    json: JsonFlag = False,
) -> None:
    """Start instances anew, once they have finished what they have."""
    from vllm_fleet.cli import orders as command

    command.restart(name, instances or [], timeout, rolling=rolling, as_json=json)


@app.command()
def logs(
    process: Annotated[str, typer.Argument(metavar="PROCESS", help="router, controller, supervisor, prefill-0, …")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as the log grows.")] = False,
    name: RunningFlag = "default",
) -> None:
    """Show what one process wrote."""
    from vllm_fleet.cli import logs as command

    command.run(name, process, follow=follow)


@app.command(epilog="Example: vllm-fleet trace 9f2c6a1b (an answer's x-request-id)")
def trace(
    request: Annotated[str, typer.Argument(metavar="ID", help="The x-request-id of an answer.")],
    name: RunningFlag = "default",
    json: JsonFlag = False,
) -> None:
    """Show where the time of one request went: router, prefill, handoff, decode."""
    from vllm_fleet.cli import trace as command

    command.run(name, request, as_json=json)


@app.command(epilog="Example: vllm-fleet top --once --json")
def top(
    name: RunningFlag = "default",
    interval: Annotated[
        float, typer.Option("--interval", "-i", metavar="S", min=0.2, max=60, help="Seconds between two looks.")
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look for one interval, print, and end.")] = False,
    json: JsonFlag = False,
) -> None:
    """Show what the fleet does, live: each instance, the router, tokens and failures."""
    from vllm_fleet.cli import top as command

    command.run(name, interval, once=once, as_json=json)


@config_app.command()
def explain(
    config: ConfigFlag = None,
    model: ModelFlag = None,
    prefill: PrefillFlag = None,
    decode: DecodeFlag = None,
    both: BothFlag = None,
    vllm_arg: VllmArgFlag = None,
    env: EnvFlag = None,
    name: NameFlag = None,
    router_port: PortFlag = None,
    host: HostFlag = None,
    workers: WorkersFlag = None,
    transport: TransportFlag = None,
    cluster: ClusterFlag = None,
    json: JsonFlag = False,
) -> None:
    """Show each setting, and where its value came from."""
    from vllm_fleet.cli import explain as command
    from vllm_fleet.cli import flags

    words = (model, prefill, decode, both, vllm_arg, env, name, router_port, host, transport, cluster, workers)
    given = flags.collect(*words)
    command.run(config, given, as_json=json)


@bench_app.command(
    epilog="Example: vllm-fleet bench fabric --transport cma,tcp --against nixl,mooncake --sizes 32MiB,1GiB"
)
def fabric(
    transport: Annotated[str, typer.Option(help="Transports to run, with commas; ones that cannot run say why.")] = (
        "cma,tcp"
    ),
    against: Annotated[str, typer.Option(help="Libraries used directly: nixl, nixl-tcp, mooncake.")] = "",
    sizes: Annotated[str, typer.Option(help="Sizes of one transfer.")] = "32MiB,128MiB,512MiB,1GiB,4GiB",
    rounds: Annotated[int, typer.Option(min=3, max=1000, help="Rounds of each size, all interleaved.")] = 30,
    checksums: Annotated[str, typer.Option(help="Run each transport with checksums too: sampled, full.")] = "",
    cuda: Annotated[
        str | None, typer.Option(metavar="A,B", help="GPU memory: copy to GPU A of this process from B of the other.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write all figures as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a picture (PNG).")] = None,
    json: JsonFlag = False,
) -> None:
    """Ways to move scattered blocks between two processes, side by side: speed, ceiling, CPU time."""
    from vllm_fleet.cli import bench as command

    command.bench_fabric(
        transports=transport,
        against=against,
        sizes=sizes,
        rounds=rounds,
        checksums=checksums,
        cuda=cuda,
        json_file=json_file,
        plot_file=plot,
        as_json=json,
    )


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """The ``vllm-fleet`` program: a wrong setting ends with code 2, any other failure with 1, one sentence each."""
    try:
        app(prog_name="vllm-fleet")
    except FleetError as error:
        typer.secho(str(error), fg=typer.colors.RED, err=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


if __name__ == "__main__":
    main()
