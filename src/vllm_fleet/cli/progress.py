"""How a fleet looks while it starts: redrawn lines on a terminal, lines on change elsewhere. All on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

import typer

from vllm_fleet.launcher.record import FleetRecord, ProcessRecord

Announce = Callable[[FleetRecord], None]
REDRAW_S = 0.2
MARKS = {
    "waiting": "·", "starting": "…", "ready": "✓", "draining": "…", "restarting": "…", "given_up": "✗", "gone": "✗",
    "stopping": "…", "stopped": "·",
}  # fmt: skip
TIMED = ("starting", "draining", "stopping", "restarting")


def table(record: FleetRecord, states: Mapping[str, str]) -> str:
    """One line for each process: name, role, url, pid, state."""
    rows = [("NAME", "ROLE", "URL", "PID", "STATE")]
    for each in record.processes:
        pid = "-" if each.id is None else str(each.id.pid)
        rows.append((each.name, each.role, each.url, pid, states[each.name]))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


class Plain:
    """Lines on change."""

    def __init__(self, announce: Announce) -> None:
        self._announce = announce
        self._states: dict[str, str] = {}
        self._began: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        return None

    def show(self, record: FleetRecord) -> None:
        """Print the processes whose state is another than last time."""
        for each in record.processes:
            if self._states.get(each.name, "waiting") != each.state:
                self._states[each.name] = each.state
                took = ""
                if each.state == "starting":
                    self._began[each.name] = each.since
                elif each.state == "ready" and each.name in self._began:
                    took = f" after {max(0.0, each.since - self._began[each.name]):.1f} s"
                typer.echo(f"{each.name}: {each.state}{took}", err=True)
        for name in self._states.keys() - {each.name for each in record.processes}:
            del self._states[name]
            typer.echo(f"{name}: gone", err=True)

    def begin(self, record: FleetRecord) -> None:
        """This is how things are: only what changes from here on is news."""
        self._states = {each.name: each.state for each in record.processes}

    def follow(self, record: FleetRecord) -> None:
        """Show a fleet that ran before we looked."""
        if not self._states:
            self.begin(record)
        self.show(record)

    def note(self, text: str) -> None:
        """Print it."""
        typer.secho(text, fg=typer.colors.YELLOW, err=True)

    def output(self, name: str, line: str) -> None:
        """Print it with the process's name before it."""
        typer.echo(f"{name} | {line}", err=True)

    def ready(self, record: FleetRecord) -> None:
        """Announce the fleet."""
        self._announce(record)


class Live(Plain):
    """One line for each process, redrawn in place until the fleet is ready; then like Plain."""

    def __init__(self, announce: Announce) -> None:
        super().__init__(announce)
        from rich.console import Console
        from rich.live import Live as RichLive

        self._live = RichLive(console=Console(file=sys.stderr), auto_refresh=False, transient=True)
        self._on = False
        self._drawn = 0.0

    def __enter__(self) -> Self:
        self._live.start()
        self._on = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._finish()

    def show(self, record: FleetRecord) -> None:
        """Draw all processes, a few times a second."""
        if not self._on:
            super().show(record)
            return
        now = time.monotonic()
        if now - self._drawn >= REDRAW_S:
            from rich.text import Text

            self._drawn = now
            wall = time.time()
            self._live.update(Text("\n".join(_line(each, wall) for each in record.processes)), refresh=True)
        self._states = {each.name: each.state for each in record.processes}

    def note(self, text: str) -> None:
        """Print it above the lines."""
        if self._on:
            self._live.console.print(text, style="yellow", markup=False, highlight=False)
        else:
            super().note(text)

    def ready(self, record: FleetRecord) -> None:
        """Take the lines away and announce the fleet."""
        self._finish()
        self._states = {each.name: each.state for each in record.processes}
        super().ready(record)

    def _finish(self) -> None:
        if self._on:
            self._on = False
            self._live.stop()


def _line(each: ProcessRecord, wall: float) -> str:
    elapsed = f"{max(0.0, wall - each.since):6.1f} s" if each.state in TIMED else ""
    return f"{MARKS[each.state]} {each.name:<14} {each.state:<10} {elapsed}"
