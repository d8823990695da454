"""Which headers cross the router, in which direction. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from vllm_fleet.core import limits

REQUEST_ID = "x-request-id"
PREFILL = "x-fleet-prefill"
DECODE = "x-fleet-decode"
HANDOFF = "x-fleet-handoff"
HANDOFF_MODE = "x-fleet-handoff-mode"
TIMELINE = "x-fleet-timeline"
SERVER_TIMING = "server-timing"

Pairs = list[tuple[str, str]]

_TO_INSTANCE = ("authorization", "accept", "traceparent", "tracestate", "user-agent", "x-session-id")
"""All that clients may say to instances by header. Others pick ranks or priorities there, or name hosts."""

_HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
_OURS = frozenset({"content-length", "date", "server", REQUEST_ID, PREFILL, DECODE, HANDOFF, HANDOFF_MODE})

_valid_id = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._:-]{{0,{limits.REQUEST_ID_LEN_MAX - 1}}}").fullmatch


def request_id(given: str | None, fresh: str) -> str:
    """The client's request id when it is a plain word of sane length, else ``fresh``."""
    return given if given is not None and _valid_id(given) else fresh


def to_instance(headers: Mapping[str, str], id_: str, label: str | None = None) -> dict[str, str]:
    """Headers of the request to an instance; ``headers`` must look names up in any case.

    ``label`` takes the place of the client's session id, which instances repeat in their KV events and use for no more.
    """
    kept = {name: headers[name] for name in _TO_INSTANCE if name in headers}
    if label is not None:
        kept["x-session-id"] = label
    return {**kept, "content-type": "application/json", REQUEST_ID: id_}


def to_client(pairs: Iterable[tuple[str, str]]) -> Pairs:
    """An instance's response headers without those that belong to one connection or to the router."""
    listed = list(pairs)
    named = {
        word.strip().lower() for name, value in listed if name.lower() == "connection" for word in value.split(",")
    }
    dropped = _HOP_BY_HOP | _OURS | named
    return [(name, value) for name, value in listed if name.lower() not in dropped]


def content_type(pairs: Iterable[tuple[str, str]]) -> str:
    """The media type without parameters, in lower case; empty when there is none."""
    for name, value in pairs:
        if name.lower() == "content-type":
            return media_type(value)
    return ""


def media_type(value: str) -> str:
    """The media type in a Content-Type header, without parameters, in lower case."""
    return value.partition(";")[0].strip().lower()
