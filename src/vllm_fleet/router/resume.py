"""Whether and how a stream that was cut off goes on at another instance. Pure; docs/requests.md has the table.

Two ways:

- **continue**: ``/v1/completions`` with the prompt's token ids and those of the answer so far. Quick, and exact where
  what vLLM does next depends on nothing but these tokens.
- **replay**: the same request again, with what the client has already left out. Exact where the answer can be
  reproduced (temperature 0, or a seed), whatever else the request asks for; what comes is compared token by token.

What depends on more than the tokens is known by the request's fields; a field this module does not know counts as one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from msgspec import Raw

from vllm_fleet.router import resume_events as ev
from vllm_fleet.router.openai import GenerateRequest, Route
from vllm_fleet.router.request_rules import Resume
from vllm_fleet.router.resume_track import Tracker

Way = Literal["continue", "approximate", "replay", "finish"]

_AS_IS = frozenset(
    {
        "allowed_token_ids",
        "bad_words",
        "cache_salt",
        "frequency_penalty",
        "ignore_eos",
        "include_stop_str_in_output",
        "logit_bias",
        "min_p",
        "model",
        "presence_penalty",
        "priority",
        "repetition_penalty",
        "seed",
        "session_id",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "stop",
        "stop_token_ids",
        "stream",
        "stream_interval",
        "stream_options",
        "temperature",
        "top_k",
        "top_p",
        "user",
    }
)
"""Fields that mean the same in a continuation."""

_OF_COMPLETIONS = frozenset(("logprobs", "logprob_token_ids", "return_tokens_as_token_ids"))

_PROMPT_ONLY = frozenset(
    {
        "add_generation_prompt",
        "add_special_tokens",
        "chat_template",
        "chat_template_kwargs",
        "continue_final_message",
        "documents",
        "include_reasoning",
        "max_completion_tokens",
        "max_tokens",
        "messages",
        "metadata",
        "min_tokens",
        "parallel_tool_calls",
        "prompt",
        "prompt_cache_key",
        "prompt_cache_retention",
        "reasoning_effort",
        "return_prompt_text",
        "return_token_ids",
        "safety_identifier",
        "service_tier",
        "store",
        "verbosity",
    }
)
"""Fields whose work is done when the prompt's tokens are known, or that the continuation sets itself."""

_NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "logprobs": (False,),
    "tools": ([],),
    "tool_choice": ("none",),
    "response_format": ({"type": "text"},),
    "vllm_xargs": ({},),
    "return_tokens_as_token_ids": (False,),
    "watermarking": (False,),
    "length_penalty": (1,),
    "routed_experts_prompt_start": (0,),
    "return_token_offsets": (False,),
}
"""Values, null apart, that ask for nothing."""


@dataclass(frozen=True, slots=True)
class Resumption:
    """What to ask another instance for."""

    way: Way
    request: GenerateRequest
    base: int
    """Tokens of the answer that are in its prompt."""
    expected: tuple[int, ...]
    """Tokens that will come again: the client, or the part of the text that it has, rests on them."""
    texts: int
    """Characters that will come again."""
    offset: int
    """Where the logprobs of the first token that comes begin."""
    clean: bool
    """Whether the prompt is known to end where a character ends."""


def wanted(request: GenerateRequest) -> GenerateRequest | None:
    """The request as instances get it, so that its stream can be resumed; None: it cannot."""
    fields = request.fields
    if bytes(fields.get("stream", b"")) != b"true" or request.skip not in (None, "multimodal"):
        return None
    if bytes(fields.get("include_reasoning", b"")) == b"false":
        return None  # vLLM gives no token ids then, so as not to tell what was thought
    return dataclasses.replace(request, fields={**fields, "return_token_ids": Raw(b"true")})


def asked_for_ids(request: GenerateRequest) -> bool:
    """Whether the client itself wants token ids."""
    return bytes(request.fields.get("return_token_ids", b"")) == b"true"


def plan(request: GenerateRequest, sent: Tracker, mode: Resume) -> Resumption | str:
    """How to go on after what was sent, or in a few words why that cannot be.

    ``request`` is the client's. ``sent`` is changed where unseen tokens are drawn anew.
    """
    sent.read()
    if sent.broken or sent.prompt is None:
        return "no_token_ids"
    if sent.finished:
        return Resumption("finish", request, len(sent.tokens), (), 0, 0, clean=True)
    again = wanted(request)
    assert again is not None, "a stream is followed that was not asked for token ids"
    if not sent.tokens:
        return Resumption("replay", again, 0, (), 0, 0, clean=True)
    values = _values(request)
    greedy = values.get("temperature") == 0
    seen = asked_for_ids(request) or "logprobs" in values
    obstacle, loose = _obstacle(values, sent, request), _loose(values, greedy=greedy)
    if obstacle is None and loose is None:
        return _continue(request, sent, values, "continue", exact=greedy, seen=seen)
    if greedy or values.get("seed") is not None:
        tokens = tuple(sent.tokens)
        return Resumption("replay", again, 0, tokens, sent.mark_texts[-1], 0, clean=True)
    if obstacle is not None:
        return obstacle
    if mode == "always":
        return _continue(request, sent, values, "approximate", exact=False, seen=True)
    return f"inexact_{loose}"


def _values(request: GenerateRequest) -> dict[str, Any]:
    """The fields but for those that are long, and those that ask for nothing."""
    found: dict[str, Any] = {}
    for name, raw in request.fields.items():
        if name in ("messages", "prompt", "documents", "chat_template"):
            continue
        value = ev.decode_any(raw)
        same = [one for one in _NEUTRAL.get(name, ()) if value == one]
        if value is not None and not any(isinstance(value, bool) is isinstance(one, bool) for one in same):
            found[name] = value
    return found


def _obstacle(values: dict[str, Any], sent: Tracker, request: GenerateRequest) -> str | None:
    """Why a continuation would be wrong: the next text depends on a state that is not in the tokens."""
    if sent.parsed:
        return "parsed"
    if request.skip is not None:
        return request.skip
    known = _AS_IS | _PROMPT_ONLY | (_OF_COMPLETIONS if request.route is Route.COMPLETIONS else frozenset())
    for name in values:
        if name in known or (name == "tools" and "tool_choice" not in values and _no_choice(request)):
            continue
        return "tools" if name in ("tools", "tool_choice") else "field"
    return None


def _no_choice(request: GenerateRequest) -> bool:
    return bytes(request.fields.get("tool_choice", b"")) == b'"none"'


def _loose(values: dict[str, Any], *, greedy: bool) -> str | None:
    """Why a continuation would go on, but not from the same state: penalties and the like count output tokens only."""
    if values.get("presence_penalty") or values.get("frequency_penalty"):
        return "penalty"
    if values.get("bad_words"):
        return "bad_words"
    if values.get("skip_special_tokens") is False and values.get("spaces_between_special_tokens") is False:
        return "special_tokens"
    if not greedy and values.get("seed") is not None:
        return "seed"
    if not greedy and values.get("stop"):
        return "stop"
    return None


def _continue(
    request: GenerateRequest, sent: Tracker, values: dict[str, Any], way: Way, *, exact: bool, seen: bool
) -> Resumption | str:
    """Go on from the last token behind which a whole character ends.

    ``exact``: tokens that are computed again are the same. ``seen``: the client knows tokens, not only their text.
    """
    held, back = _stop_room(values)
    last = len(sent.mark_tokens) - 1
    texts, clean = sent.mark_texts[last], True
    if exact or held or back:
        mark = _clean_mark(sent, held, back)
    else:
        mark = _clean_mark(sent, 0, 0)
        if mark != last and (seen or sent.mark_texts[mark] != texts):
            mark, clean = last, False
    again = texts - (sent.mark_texts[mark] + held if mark else 0)
    offset, base = sent.mark_offsets[mark], sent.mark_tokens[mark]
    expected = tuple(sent.tokens[base:]) if exact else ()
    fields = _fields(request, sent, values, base)
    if fields is None:
        return "no_tokens_left"
    if not exact:
        sent.forget(mark, texts)
    body = dataclasses.replace(request, route=Route.COMPLETIONS, fields=fields, skip=None, dropped=())
    return Resumption(way, body, base, expected, max(again, 0), offset, clean)


def _stop_room(values: dict[str, Any]) -> tuple[int, int]:
    """Characters that vLLM holds back for stop strings, and those that it sends and a stop string may begin in."""
    stops = values.get("stop") or []
    room = max((len(one) for one in ([stops] if isinstance(stops, str) else stops)), default=1) - 1
    return (0, room) if values.get("include_stop_str_in_output") else (room, 0)


def _clean_mark(sent: Tracker, held: int, back: int) -> int:
    """The last mark to go on from.

    It comes after an event of one token with text: then no part of a character is left over, on which vLLM's
    detokenizer (tokenizers' DecodeStream, primed with the prompt) would begin the prompt's text anew. ``held``: vLLM
    keeps so many characters back for stop strings, so the tokens' text is so much longer than what was sent, and may
    not go beyond it. ``back``: characters sent that a stop string may begin in.
    """
    end = sent.mark_texts[-1] - back
    for mark in range(len(sent.mark_tokens) - 1, 0, -1):
        one_token = sent.mark_tokens[mark] - sent.mark_tokens[mark - 1] == 1
        if one_token and sent.mark_texts[mark] > sent.mark_texts[mark - 1] and sent.mark_texts[mark] + held <= end:
            return mark
    return 0


def _fields(request: GenerateRequest, sent: Tracker, values: dict[str, Any], base: int) -> dict[str, Raw] | None:
    """The body of the continuation; None: no token is left to ask for."""
    assert sent.prompt is not None, "a prompt that is not known cannot be continued"
    kept = _AS_IS | _OF_COMPLETIONS if request.route is Route.COMPLETIONS else _AS_IS
    fields = {name: raw for name, raw in request.fields.items() if name in kept}
    limit = values.get("max_tokens")
    if request.route is Route.CHAT:
        limit = values.get("max_completion_tokens", limit)
    elif "max_tokens" not in request.fields:
        limit = 16  # vLLM's default for completions
    if limit is not None and limit <= base:
        return None
    left: dict[str, Any] = {
        "prompt": [*sent.prompt, *sent.tokens[:base]],
        "max_tokens": None if limit is None else limit - base,
        "return_token_ids": True,
    }
    if values.get("min_tokens", 0) > base:
        left["min_tokens"] = values["min_tokens"] - base
    encoded: dict[str, Raw] = {name: Raw(msgspec.json.encode(value)) for name, value in left.items()}
    return {**fields, **encoded}
