"""``vllm-fleet scale``, ``role``, ``drain`` and ``restart``: change a fleet while it serves, and show how that goes."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import typer

from vllm_fleet.cli.progress import Live, Plain, table
from vllm_fleet.config.load import process_environment
from vllm_fleet.core.errors import ConfigError
from vllm_fleet.launcher import desired
from vllm_fleet.launcher.desired import Slots
from vllm_fleet.launcher.orders import Edit, Orders
from vllm_fleet.launcher.record import FleetRecord
from vllm_fleet.launcher.status import status
from vllm_fleet.launcher.up import run_folder
from vllm_fleet.wire.names import ROLES, Role


def scale(fleet: str, wanted: Sequence[str], timeout_s: float, *, as_json: bool) -> None:
    """So many instances of each role."""
    counts = parse_counts(wanted)
    _carry_out(fleet, lambda slots, record: desired.scaled(slots, counts, _names(record)), timeout_s, as_json)


def role(fleet: str, name: str, wanted: str, timeout_s: float, *, as_json: bool) -> None:
    """Another role for one instance."""
    new = parse_role(wanted)
    _carry_out(fleet, lambda slots, record: desired.with_role(slots, name, new), timeout_s, as_json)


def drain(fleet: str, name: str, timeout_s: float, *, as_json: bool) -> None:
    """One instance less."""
    _carry_out(fleet, lambda slots, record: desired.without(slots, name), timeout_s, as_json)


def restart(fleet: str, names: Sequence[str], timeout_s: float, *, rolling: bool, as_json: bool) -> None:
    """New lives for instances."""

    def edit(slots: Slots, record: FleetRecord) -> Slots:
        return desired.restarted(slots, names, rolling=rolling, busy=_names(record), dead=_dead(record))

    _carry_out(fleet, edit, timeout_s, as_json)


def parse_counts(wanted: Sequence[str]) -> dict[Role, int]:
    """``prefill=2`` and the like."""
    counts: dict[Role, int] = {}
    for text in wanted:
        name, equals, count = text.partition("=")
        if not equals or not count.isdecimal() or len(count) > 4:
            raise ConfigError(f"expected ROLE=NUMBER such as decode=3, found {text!r}")
        counts[parse_role(name)] = int(count)
    return counts


def parse_role(text: str) -> Role:
    """One of the roles."""
    if text not in ROLES:
        raise ConfigError(f"there is no role {text!r}; roles are {', '.join(ROLES)}")
    return text


def _carry_out(fleet: str, edit: Edit, timeout_s: float, as_json: bool) -> None:
    run = run_folder(fleet, process_environment())
    orders = Orders(run)
    ordered = orders.change(edit)
    view = Live(lambda record: None) if sys.stderr.isatty() else Plain(lambda record: None)
    if timeout_s > 0 and ordered.names:
        with view:
            orders.wait(ordered, view.follow, timeout_s)
    found = status(run)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
    else:
        typer.echo(table(found.record, found.states))


def _names(record: FleetRecord) -> set[str]:
    return {each.name for each in record.processes}


def _dead(record: FleetRecord) -> set[str]:
    return {each.name for each in record.processes if each.state in ("given_up", "restarting", "waiting", "gone")}
