"""What policies may ask about a request. Each fact is computed when it is first asked for, and kept."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from hashlib import blake2b
from typing import NamedTuple

import msgspec

from vllm_fleet.router.openai import GenerateRequest, Route
from vllm_fleet.router.prefix.tree import Leaf, Match

BYTES_PER_TOKEN = 4.0
"""Of text, where nothing better is known: English in most vocabularies of 30,000 tokens and more."""

_SHAPES_PROMPT = (
    "model",  # an adapter has a name of its own
    "cache_salt",
    "tools",
    "documents",
    "chat_template",
    "chat_template_kwargs",
    "reasoning_effort",
    "tool_choice",
    "add_special_tokens",
    "mm_processor_kwargs",
)
"""Fields that decide which KV a text means: prompts that differ in one of them share nothing."""

_SESSION_FIELDS = ("prompt_cache_key", "user")
_WHITESPACE = b" \t\r\n"
_SPACE_LEN_MAX = 128  # longer ones are kept as a digest


class Prompt(NamedTuple):
    """A prompt as the client wrote it."""

    space: bytes
    """Equal for prompts that may share KV."""
    text: bytes
    """JSON without its last byte, the closing bracket or quote: the next turn of a conversation begins with it."""


class Facts:
    """One request. Headers must look names up in any case."""

    def __init__(self, request: GenerateRequest, headers: Mapping[str, str]) -> None:
        self._request, self._headers = request, headers
        self.label: str | None = None
        """Set by a policy that wants to find this request in KV events; goes to instances as X-Session-ID."""
        self.match: Match | None = None
        """Kept by the prefix policy, for the second of prefill and decode to choose."""
        self.leaf: Leaf | None = None

    @cached_property
    def prompt(self) -> Prompt:
        """The prompt and what it may share with others."""
        fields = self._request.fields
        chat = self._request.route is Route.CHAT
        raw = bytes(fields.get("messages" if chat else "prompt", b"")).strip(_WHITESPACE)
        parts = [b"chat" if chat else b"text"]
        for name in _SHAPES_PROMPT:
            if name in fields:
                parts += (name.encode(), bytes(fields[name]))
        space = b"\0".join(parts)
        if len(space) > _SPACE_LEN_MAX:
            space = blake2b(space, digest_size=32).digest()
        return Prompt(space, raw[:-1])

    @cached_property
    def tokens(self) -> int:
        """About how many tokens the prompt has: exact for token ids, by its bytes for text."""
        text = self.prompt.text
        if text[:1] == b"[" and self._request.route is Route.COMPLETIONS and text[1:].lstrip(_WHITESPACE)[:1].isdigit():
            return text.count(b",") + 1
        return int(len(text) / BYTES_PER_TOKEN)

    def session(self, header: str) -> str | None:
        """What tells requests of one session from others: the header, else ``prompt_cache_key`` or ``user``."""
        given = self._headers.get(header)
        if given:
            return given
        for name in _SESSION_FIELDS:
            raw = bytes(self._request.fields.get(name, b""))
            if raw[:1] == b'"' and raw != b'""':
                try:
                    return msgspec.json.decode(raw, type=str)
                except (msgspec.MsgspecError, UnicodeDecodeError):
                    return None
        return None
