"""``vllm-fleet trace``."""

from __future__ import annotations

import json

import typer

from vllm_fleet.config.load import process_environment
from vllm_fleet.launcher.trace import Trace, trace
from vllm_fleet.launcher.up import run_folder
from vllm_fleet.wire.handoff import TraceRecord

BAR_WIDTH = 40
STEPS = {
    "received": "request received",
    "prefill_sent": "sent to {prefill}",
    "prefill_answered": "{prefill} answered",
    "decode_sent": "sent to {decode}",
    "first_byte": "first byte from {decode}",
    "ended": "answer complete",
}


def run(name: str, request_id: str, *, as_json: bool) -> None:
    """Print one request's timeline."""
    found = trace(run_folder(name, process_environment()), request_id)
    for remark in found.remarks:
        typer.secho(remark, fg=typer.colors.YELLOW, err=True)
    typer.echo(json.dumps(found.to_json(), indent=2) if as_json else "\n".join(lines(found)))


def lines(found: Trace) -> list[str]:
    """The timeline as text, a line for each thing that happened."""
    router = found.router
    how = "" if router.mode is None else f", {router.mode} handoff"
    status = "under way" if router.outcome is None else f"{router.status} {router.outcome}"
    shown = [f"{router.id}  {router.route}  {status}{how}"]
    whole = max(router.seconds.values()) or 1.0
    for step, at in sorted(router.seconds.items(), key=lambda item: item[1]):
        text = STEPS.get(step, step).format(prefill=router.prefill, decode=router.decode)
        shown.append(f"{1000 * at:10.1f} ms  {_bar(at / whole)}  {text}")
    for instance, records in found.workers.items():
        for record in records:
            shown += _worker_lines(instance, record)
    return shown


def _bar(share: float) -> str:
    at = min(BAR_WIDTH - 1, round(share * (BAR_WIDTH - 1)))
    return "─" * at + "●" + " " * (BAR_WIDTH - 1 - at)


def _worker_lines(instance: str, record: TraceRecord) -> list[str]:
    times = f"queued {_ms(record.queued_s)}, "
    if record.kind == "hold":
        times += f"computed {record.tokens} tokens in {_ms(record.ready_s)}, blocks kept until {_ms(record.whole_s)}"
        return [f"{instance}: {record.outcome}; {times}"]
    times += f"KV of {record.tokens} tokens ready after {_ms(record.ready_s)}, loaded after {_ms(record.whole_s)}"
    shown = [f"{instance}: {record.outcome}; {times}"]
    for part in record.parts:
        speed = f", {part.nbytes / part.copy_s / 1e9:.1f} GB/s" if part.copy_s > 0 else ""
        what = part.error or f"{part.nbytes / 2**20:.2f} MiB in {part.copies} copies, {_ms(part.copy_s)}{speed}"
        shown.append(f"  {part.transport} from {part.peer}: {what}")
    return shown


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"
