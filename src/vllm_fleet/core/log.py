"""Logs are events: a name from one list and named values. The list below is the manual.

Never log prompts, tokens, secrets or raw bytes of a peer: a decode failure logs a length.
"""

from __future__ import annotations

import json
import logging
import sys

EVENTS: dict[str, str] = {
    "auth.refused": "a connection did not prove the fleet's token; it was closed",
    "child.exit": "a child process ended",
    "child.start": "a child process was started",
    "config.port_retry": "a port was taken between choosing and using it; another is tried",
    "controller.start": "the controller listens",
    "controller.unreachable": "the controller does not answer; the last known fleet stays in use",
    "frame.refused": "a peer sent bytes that are no valid frame; its connection was closed",
    "handoff.expired": "a lease ended before decode took the KV; its blocks are freed",
    "handoff.failed": "decode could not load KV and recomputes the prompt",
    "handoff.no_bytes": "requests were handed off but decode loaded no KV: prefill/decode in name only",
    "handoff.refused": "kv_transfer_params were not signed by this fleet or do not fit; they are ignored",
    "instance.registered": "this instance registered with the controller",
    "journal.truncated": "the journal ended in a torn record, which was dropped",
    "link.chosen": "a link to a peer is up; says which transport and why better ones were passed over",
    "link.lost": "a link to a peer broke",
    "member.changed": "a member of the fleet changed its state",
    "member.gone": "a member of the fleet left or its lease ended",
    "router.start": "the router listens",
    "upstream.failed": "an instance did not answer a request",
}

_LOGGER = logging.getLogger("vllm_fleet")


def setup(stream: object = None) -> None:
    """Send this process's events to ``stream`` (default: standard error), a line each."""
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)  # type: ignore[arg-type]
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s"))
    _LOGGER.handlers[:] = [handler]
    _LOGGER.setLevel(logging.INFO)
    _LOGGER.propagate = False


def event(name: str, *, level: int = logging.INFO, **values: object) -> None:
    """Log one event; ``name`` must be in EVENTS."""
    assert name in EVENTS, f"unknown event {name!r}: add it to core/log.py"
    if _LOGGER.isEnabledFor(level):
        text = " ".join(f"{key}={json.dumps(value, default=str)}" for key, value in values.items())
        _LOGGER.log(level, "%s %s", name, text)


def warn(name: str, **values: object) -> None:
    """Log one event that an operator should look at."""
    event(name, level=logging.WARNING, **values)
