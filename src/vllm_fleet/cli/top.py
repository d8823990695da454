"""``vllm-fleet top``: a live view of a fleet."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque

import msgspec
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vllm_fleet.config.load import process_environment
from vllm_fleet.launcher.top import InstanceRow, Look, Looker, RouterRow, Top, top
from vllm_fleet.launcher.up import run_folder

WINDOW_S = 30.0
"""Times to the first byte are of the last so many seconds."""
_WIDE = 100
_STYLES = {"ready": "green", "suspect": "red", "gone": "red", "given_up": "red"}
_KV_FULL = 0.9
_NONE = "-"


def run(name: str, interval_s: float, *, once: bool, as_json: bool) -> None:
    """Look at a fleet until Ctrl-C, or ``once`` for one interval."""
    console = Console(highlight=False)
    with Looker(run_folder(name, process_environment())) as looker, contextlib.suppress(KeyboardInterrupt):
        before = looker.look()
        if not once:
            _follow(looker, before, interval_s, console, as_json=as_json)
        time.sleep(interval_s)
        _show(top(looker.look(), before, None), console, as_json=as_json)


def _follow(looker: Looker, before: Look, interval_s: float, console: Console, *, as_json: bool) -> None:
    kept = deque([before])
    live = Live(console=console, screen=True, auto_refresh=False) if console.is_terminal and not as_json else None
    with live if live is not None else contextlib.nullcontext():
        while True:
            time.sleep(max(0.0, kept[-1].at + interval_s - time.monotonic()))
            now = looker.look()
            shown = top(now, kept[-1], kept[0])
            kept.append(now)
            while kept[1].at <= now.at - WINDOW_S:
                kept.popleft()
            if live is not None:
                live.update(view(shown, console.width, console.height), refresh=True)
            else:
                _show(shown, console, as_json=as_json)


def _show(shown: Top, console: Console, *, as_json: bool) -> None:
    if as_json:
        typer.echo(msgspec.json.encode(shown))
    else:
        console.print(view(shown, console.width))
    sys.stdout.flush()


def view(shown: Top, width: int, height: int = 1 << 16) -> Group:
    """The fleet as text for a terminal of this size; what does not fit is left out, and said to be."""
    head = _head(shown, width)
    room = max(1, height - len(head) - 3)  # the table's own head, a line between, and one for what is left out
    rows = shown.instances if len(shown.instances) <= room else shown.instances[: room - 1]
    parts: list[Text | Table] = [*head, Text(), _instances(rows, width)]
    if len(rows) < len(shown.instances):
        parts.append(Text(f"… and {len(shown.instances) - len(rows)} more; --once shows all", style="dim"))
    return Group(*parts)


def _head(shown: Top, width: int) -> list[Text]:
    ready = sum(row.state == "ready" for row in shown.instances)
    total = sum(row.tokens_s or 0.0 for row in shown.instances)
    title = Text(f"{shown.fleet}  ", style="bold")
    title.append(f"{shown.model}  ", style="default")
    title.append(shown.phase, style="green" if shown.phase == "serving" else "yellow")
    title.append(f"  {ready}/{len(shown.instances)} ready  {_number(total)} tokens/s", style="default")
    lines = [title, *(_router(shown.router, shown.window_s, width) if shown.router is not None else [])]
    lines += [Text(remark, style="yellow") for remark in shown.remarks]
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return lines


def _router(row: RouterRow, window_s: float, width: int) -> list[Text]:
    since = "since start" if not window_s else f"{window_s:.0f} s"
    traffic = Text(f"router  {row.url}  {_number(row.requests_s)} requests/s  {row.in_flight} in flight")
    if row.waiting:
        traffic.append(f"  {row.waiting} waiting", style="yellow")
    times = Text(f"first byte p50 {_ms(row.first_byte_p50_s)}  p99 {_ms(row.first_byte_p99_s)} ({since})")
    share = f"{row.handed_off / row.requests:.0%}" if row.requests else _NONE
    counts = Text(f"errors {_number(row.errors_s)}/s", style="red" if row.errors_s else "")
    more = f"  refused {_number(row.refused_s)}/s  retries {row.retries}  resumes {row.resumes}  handed off {share}"
    counts.append(more, style="default")
    if width < _WIDE:
        return [traffic, times, counts]
    return [traffic, times.append("  ").append_text(counts)]


_COLUMNS = ("NAME", "ROLE", "STATE", "FLIGHT", "RUN", "WAIT", "KV", "PROMPT/S", "TOKENS/S", "HANDOFFS", "FAILED")
_DROPPED = ("PROMPT/S", "ROLE", "HANDOFFS", "FLIGHT", "RUN", "FAILED", "WAIT", "TOKENS/S")
"""What a narrow terminal does without, first things first."""


def _instances(rows: tuple[InstanceRow, ...], width: int) -> Table:
    cells = [dict(zip(_COLUMNS, _cells(row), strict=True)) for row in rows]
    widths = {name: max(len(name), *(len(row[name]) for row in cells)) if cells else len(name) for name in _COLUMNS}
    columns, padding = list(_COLUMNS), 2
    for name in _DROPPED:
        if sum(widths[each] for each in columns) + padding * (len(columns) - 1) <= width:
            break
        columns.remove(name)
    made = Table(box=None, padding=(0, padding, 0, 0), pad_edge=False, header_style="dim")
    for name in columns:
        made.add_column(name, justify="left" if name in ("NAME", "ROLE", "STATE") else "right", no_wrap=True)
    for row in cells:
        made.add_row(*(row[name] for name in columns))
    return made


def _cells(row: InstanceRow) -> tuple[Text, ...]:
    full = row.kv_used is not None and row.kv_used >= _KV_FULL
    return (
        Text(row.name),
        Text(row.role),
        Text(row.state, style=_STYLES.get(row.state, "yellow")),
        _count(row.in_flight),
        _count(row.running),
        _count(row.waiting, warn=True),
        Text(_NONE if row.kv_used is None else f"{row.kv_used:.0%}", style="red" if full else ""),
        Text(_number(row.prompt_tokens_s)),
        Text(_number(row.tokens_s)),
        _count(row.handoffs),
        _count(row.failures, warn=True),
    )


def _count(value: int | None, *, warn: bool = False) -> Text:
    return Text(_NONE if value is None else str(value), style="yellow" if warn and value else "")


def _number(value: float | None) -> str:
    """Three digits that matter, at most."""
    if value is None:
        return _NONE
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{value:.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return _NONE
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
