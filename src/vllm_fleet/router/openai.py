"""What the router reads and writes in OpenAI request bodies. Pure; values it does not need stay the bytes they were.

A body is cut into its top-level fields, whose values are copied verbatim. Fields that steer the inside of the fleet are
dropped (STEERING): they could name addresses, processes or memory, and are only ever set by the router itself.
``cache_salt`` stays: it separates a user's prefixes from others', and changes nothing but which cache entries fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import msgspec
from msgspec import Raw, Struct

from vllm_fleet.core.errors import BadRequest

STEERING = frozenset({"kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode", "request_id", "session_id"})
"""Dropped from bodies of clients, and from vllm_xargs, which vLLM merges into the same place. vLLM would take the
request's id from here when no X-Request-Id came; the router always sends one. A session's id goes before X-Session-ID,
which is the router's label in KV events, and the report mode makes instances repeat events of blocks told before."""

_PREFILL_DROPS = frozenset(
    {
        "logprob_token_ids",
        "logprobs",
        "min_tokens",  # over max_tokens it would be refused
        "return_prompt_text",
        "return_token_ids",
        "return_tokens_as_token_ids",
        "seed",  # vLLM 0.32 on CPU dies of it when prefill comes in chunks (gpu_model_runner.py, set_offset)
        "stream_options",  # only valid with stream
        "top_logprobs",
    }
)
"""What only matters to an answer that somebody reads. ``stop`` stays: an answer that ended by ``stop`` holds its KV
like one that ended by ``length``, and a wrong value is refused before any work is done."""

HOLD = b'{"do_remote_decode":true,"do_remote_prefill":false}'
"""The kv_transfer_params that ask a prefill instance to hold the KV and to say in its answer where it is."""

_TEXT_PARTS = frozenset({"text", "input_text", "output_text", "refusal", "thinking"})
_WHITESPACE = b" \t\r\n"


class Route(Enum):
    """The endpoints that generate; the value is the path."""

    COMPLETIONS = "/v1/completions"
    CHAT = "/v1/chat/completions"


class _Part(Struct):
    type: str = ""


class _Message(Struct):
    content: Raw = Raw(b"null")


_decode_fields = msgspec.json.Decoder(dict[str, Raw]).decode
_decode_messages = msgspec.json.Decoder(list[_Message]).decode
_decode_parts = msgspec.json.Decoder(list[_Part | str]).decode
_decode_array = msgspec.json.Decoder(list[Raw]).decode
_encode = msgspec.json.Encoder().encode
_MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A client's request, cut into its fields, without those that steer."""

    route: Route
    fields: dict[str, Raw]
    skip: str | None
    """Why this request cannot be handed off; None: it can."""
    dropped: tuple[str, ...]
    """Steering fields the client had sent."""

    def prefill_body(self, kv_transfer_params: bytes = HOLD) -> bytes:
        """What a prefill instance gets: the same prompt, one token, an unstreamed answer."""
        fields: dict[str, Any] = {name: raw for name, raw in self.fields.items() if name not in _PREFILL_DROPS}
        fields |= {"stream": False, "n": 1, "max_tokens": 1, "temperature": 0}  # nobody reads its token
        if self.route is Route.CHAT:
            fields["max_completion_tokens"] = 1
        if "best_of" in fields:
            fields["best_of"] = 1
        fields["kv_transfer_params"] = Raw(kv_transfer_params)
        return _encode(fields)

    def decode_body(self, kv_transfer_params: bytes) -> bytes:
        """What a decode instance gets: the client's request and where the prompt's KV is."""
        return _encode({**self.fields, "kv_transfer_params": Raw(kv_transfer_params)})

    def local_body(self) -> bytes:
        """What an instance gets that does everything itself."""
        return _encode(self.fields)


def parse_request(route: Route, body: bytes) -> GenerateRequest:
    """The request in ``body``.

    Raises:
        BadRequest: it is not a JSON object.
    """
    try:
        body.decode()  # values are copied unread: without this, broken text would reach the instances
        fields = _decode_fields(body)
    except UnicodeDecodeError as error:
        raise BadRequest(f"byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise BadRequest("it is nested too deeply") from None
    except msgspec.MsgspecError as error:
        raise BadRequest(_reason(error)) from None
    dropped = _drop_steering(fields)
    return GenerateRequest(route, fields, _skip_reason(route, fields), dropped)


def _reason(error: msgspec.MsgspecError) -> str:
    text = str(error).replace("JSON is malformed: ", "").replace("Input data was truncated", "it ends too early")
    return f"{text[:1].lower()}{text[1:200]}"


def _drop_steering(fields: dict[str, Raw]) -> tuple[str, ...]:
    dropped = [name for name in sorted(STEERING) if fields.pop(name, None) is not None]
    extra = fields.get("vllm_xargs")
    if extra is not None:
        try:
            inner = _decode_fields(extra)
        except _MALFORMED:  # null, or what the instance refuses
            return tuple(dropped)
        found = sorted(STEERING & inner.keys())
        if found:
            fields["vllm_xargs"] = Raw(_encode({name: raw for name, raw in inner.items() if name not in STEERING}))
            dropped += [f"vllm_xargs.{name}" for name in found]
    return tuple(dropped)


def _skip_reason(route: Route, fields: dict[str, Raw]) -> str | None:
    """Why a request cannot be handed off. Each reason is a label of a metric: the list is closed."""
    if _set(fields, "n") and not _is(fields, "n", b"1"):
        return "n"
    if _set(fields, "best_of") and not _is(fields, "best_of", b"1"):
        return "best_of"
    for name in ("use_beam_search", "echo"):
        if _set(fields, name) and not _is(fields, name, b"false"):
            return name
    for name in ("prompt_logprobs", "prompt_embeds", "truncate_prompt_tokens"):
        if _set(fields, name):
            return name
    if _set(fields, "suffix") and not _is(fields, "suffix", b'""'):
        return "suffix"
    for name in ("max_tokens", "max_completion_tokens"):
        if _is(fields, name, b"0"):
            return "no_answer_wanted"
    if route is Route.COMPLETIONS:
        return _prompt_reason(fields)
    return _messages_reason(fields)


def _prompt_reason(fields: dict[str, Raw]) -> str | None:
    prompt = bytes(fields.get("prompt", b"")).strip(_WHITESPACE)
    if prompt[:1] == b'"':
        return None if prompt != b'""' else "malformed"
    if prompt[:1] != b"[":
        return "malformed"
    first = prompt[1:].lstrip(_WHITESPACE)[:1]
    if first.isdigit():  # one prompt of token ids
        return None
    if first not in (b'"', b"["):
        return "malformed"
    return None if len(_decode_array(prompt)) == 1 else "several_prompts"


def _messages_reason(fields: dict[str, Raw]) -> str | None:
    """Images and the like are not handed off: a ticket's digest covers the prompt's tokens, not what they stand for."""
    if "messages" not in fields:
        return "malformed"
    try:
        for message in _decode_messages(fields["messages"]):
            content = message.content
            if bytes(content)[:1] != b"[":
                continue
            for part in _decode_parts(content):
                if isinstance(part, _Part) and part.type not in _TEXT_PARTS:
                    return "multimodal"
    except _MALFORMED:
        return "malformed"
    return None


def _set(fields: dict[str, Raw], name: str) -> bool:
    return name in fields and bytes(fields[name]) != b"null"


def _is(fields: dict[str, Raw], name: str, value: bytes) -> bool:
    return name in fields and bytes(fields[name]) == value


class _PrefillAnswer(Struct):
    kv_transfer_params: Raw = Raw(b"null")


_decode_prefill_answer = msgspec.json.Decoder(_PrefillAnswer).decode


def take_params(body: bytes) -> bytes | None:
    """The kv_transfer_params of a prefill instance's answer, verbatim; None when there are none."""
    try:
        params = bytes(_decode_prefill_answer(body).kv_transfer_params)
    except _MALFORMED:
        return None
    return params if params.startswith(b"{") and params != b"{}" else None
