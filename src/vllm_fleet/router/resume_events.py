"""Events of vLLM's streams: read for what a resume needs, written as another instance would have written them. Pure.

Shapes are those of vLLM 0.32: entrypoints/openai/completion/serving.py (completion_stream_generator) and
entrypoints/openai/chat_completion/serving.py (chat_completion_stream_generator). With ``return_token_ids`` the first
event carries the prompt's token ids (of a completion in its choice, of a chat beside the choices), and each choice the
ids of its tokens; without, the same fields are there and null.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import Raw, Struct

_PREFIX = b"data: "
_KEY = b'token_ids":['
_KEY_LEN = len(_KEY)
DONE = b"data: [DONE]\n\n"


class Delta(Struct):
    """What a chat's event adds to its message."""

    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: Raw = Raw(b"null")

    def empty(self) -> bool:
        """A parser of the instance's kept everything back."""
        return self.role is None and self.content is None and not self.parsed()

    def parsed(self) -> bool:
        """It holds what only a parser of the instance's can have made."""
        thought = self.reasoning is not None or self.reasoning_content is not None
        return thought or bytes(self.tool_calls) not in (b"null", b"[]")


class Choice(Struct):
    """One answer's part of an event."""

    index: int = 0
    text: str | None = None
    delta: Delta | None = None
    logprobs: Raw = Raw(b"null")
    finish_reason: str | None = None
    stop_reason: Raw = Raw(b"null")
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None

    def shown(self) -> str:
        """The text that the client gets."""
        if self.delta is not None:
            return self.delta.content or ""
        return self.text or ""


class ErrorBody(Struct):
    """An error within a stream."""

    code: int | str | None = None
    type: str = ""
    message: str = ""


class Event(Struct):
    """One event."""

    id: str = ""
    created: int = 0
    model: str = ""
    choices: list[Choice] = []
    prompt_token_ids: list[int] | None = None
    usage: Raw = Raw(b"null")
    system_fingerprint: Raw = Raw(b"null")
    error: ErrorBody | None = None


class Logprobs(Struct):
    """A completion's logprobs: lists with an entry for each token."""

    text_offset: list[int] = []
    token_logprobs: list[Raw] = []
    tokens: list[str] = []
    top_logprobs: list[Raw] = []


decode = msgspec.json.Decoder(Event).decode
decode_many = msgspec.json.Decoder(list[Event]).decode
decode_logprobs = msgspec.json.Decoder(Logprobs).decode
encode = msgspec.json.Encoder().encode
decode_any = msgspec.json.Decoder().decode


def bodies(events: bytes) -> Iterator[bytes]:
    """The JSON of each of some whole events; comments and ``[DONE]`` are left out."""
    for event in events.replace(b"\r\n", b"\n").split(b"\n\n"):
        if event.startswith(_PREFIX) and event != b"data: [DONE]":
            yield event[len(_PREFIX) :]


def write(fields: dict[str, Any]) -> bytes:
    """One event."""
    return _PREFIX + encode(fields) + b"\n\n"


def without_token_ids(events: bytes) -> bytes:
    """The same with each list of token ids replaced by null: what an instance sends that was not asked for them.

    In a string of JSON a quote is escaped, so the key can only be a key.
    """
    at = events.find(_KEY)
    if at < 0:
        return events
    parts: list[bytes] = []
    start = 0
    while at >= 0:
        end = events.index(b"]", at)
        parts.append(events[start : at + _KEY_LEN - 1])
        start = end + 1
        at = events.find(_KEY, start)
    parts.append(events[start:])
    kept = b"null".join(parts)
    if b'"delta":{}' in kept:
        kept = _without_empty_deltas(kept)
    return kept


def _without_empty_deltas(events: bytes) -> bytes:
    """Without events that an instance sends only because it was asked for token ids: a parser kept their text back."""
    nothing = b'"delta":{},"logprobs":null,"finish_reason":null'
    parts = events.split(b"\n\n")
    return b"\n\n".join(part for part in parts if nothing not in part)
