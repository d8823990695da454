"""A language model in a few lines that streams as vLLM does: enough to tell a right continuation from a wrong one.

What the next token depends on is what it depends on in vLLM: all tokens before; with penalties, the output's own; with
a grammar, how far the output is; with a seed, how many numbers were drawn. Characters come in pieces, text is held back
for stop strings, and a detokenizer primed with half a character repeats the prompt, as the real one does.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

EOS, SPECIAL = 0, 1
WORDS = [
    b"",
    b"",
    b"a",
    b"b ",
    b"the ",
    b" of",
    b"x",
    b"\n",
    b'"',
    b"q",
    b"end",
    b"\xc3",
    b"\xa9",
    b"\xe2",
    b"\x82",
    b"\xac",
]
_FIRST = {11: (12,), 13: (14, 15), 14: (15,)}  # what completes a character that has begun


def encode(text: str) -> list[int]:
    """A prompt's tokens: one for each character, and always the same ones."""
    return [2 + zlib.crc32(character.encode()) % 9 for character in text]


def text_of(ids: list[int]) -> str:
    return b"".join(WORDS[one] for one in ids).decode(errors="replace")


class Detokenizer:
    """tokenizers' DecodeStream, primed with the prompt."""

    def __init__(self, prompt: list[int]) -> None:
        self._ids, self._prefix, self._index = list(prompt), "", 0

    def step(self, token: int) -> str:
        if not self._prefix and self._ids:
            before = text_of(self._ids)
            if not before.endswith("�"):
                self._prefix, self._index = before, len(self._ids)
        self._ids.append(token)
        text = text_of(self._ids)
        if len(text) <= len(self._prefix) or text.endswith("�"):
            return ""
        new = text[len(self._prefix) :]
        kept = len(self._ids) - self._index
        self._ids = self._ids[self._index :]
        self._prefix, self._index = text_of(self._ids), kept
        return new


@dataclass
class Part:
    """What one step of an engine gives."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: str | None = None
    stop: str | None = None


class Generation:
    """One request at one instance."""

    def __init__(self, body: dict[str, Any], prompt: list[int], limit: int | None, rng: random.Random) -> None:
        self._body, self._prompt, self._rng = body, prompt, rng
        self._limit = 10_000 if limit is None else limit
        self._output: list[int] = []
        stops = body.get("stop") or []
        self._stops = [stops] if isinstance(stops, str) else stops
        self._include = bool(body.get("include_stop_str_in_output"))
        self._held = 0 if self._include else max((len(one) for one in self._stops), default=1) - 1

    def _next(self) -> int:
        ids = self._prompt + self._output
        state: tuple[Any, ...] = (tuple(ids[-7:]), len(ids))
        if self._body.get("presence_penalty"):
            state += tuple(sorted(set(self._output)))
        if self._body.get("response_format", {"type": "text"}) != {"type": "text"}:
            state += (len(self._output), "json")
        if self._body.get("temperature") != 0:
            seed = self._body.get("seed")
            state += (self._rng.getrandbits(32),) if seed is None else (seed, len(self._output))
        drawn = zlib.crc32(repr(state).encode())
        if ids[-1] in _FIRST and drawn % 8:
            return _FIRST[ids[-1]][drawn // 8 % len(_FIRST[ids[-1]])]
        token = drawn // 8 % len(WORDS)
        if token == EOS and (drawn % 5 or self._body.get("ignore_eos") or len(self._output) < self._min()):
            token = 2
        return token

    def _min(self) -> int:
        return int(self._body.get("min_tokens", 0))

    def parts(self) -> Iterator[Part]:
        """Token by token."""
        detokenizer, text, sent = Detokenizer(self._prompt), "", 0
        while True:
            token = self._next()
            self._output.append(token)
            part = Part([token])
            if token != EOS or self._include:
                before = len(text)
                text += detokenizer.step(token)
                if len(self._output) > self._min():
                    text, part.stop = self._stopped(text, before)
            if part.stop is not None or token == EOS:
                part.finish = "stop"
            elif len(self._output) >= self._limit:
                part.finish = "length"
            upto = len(text) if part.finish else max(sent, len(text) - self._held)
            part.text, sent = text[sent:upto], max(sent, upto)
            yield part
            if part.finish:
                return

    def _stopped(self, text: str, before: int) -> tuple[str, str | None]:
        for stop in self._stops:
            at = text.find(stop, max(0, before - len(stop) + 1))
            if at >= 0:
                return text[: at + len(stop) if self._include else at], stop
        return text, None


def merged(parts: Iterator[Part], rng: random.Random, share: float) -> Iterator[Part]:
    """Several steps in one event now and then: the server was busy."""
    kept: Part | None = None
    for part in parts:
        if kept is not None:
            part = Part(kept.tokens + part.tokens, kept.text + part.text, part.finish, part.stop)
        kept = part if part.finish is None and rng.random() < share else None
        if kept is None:
            yield part


class Stream:
    """One answer as events, in the shapes of vLLM 0.32."""

    def __init__(
        self, path: str, body: dict[str, Any], request_id: str, rng: random.Random, merge: float = 0.0
    ) -> None:
        self.chat, self._body = path.endswith("chat/completions"), body
        self.prompt = self._tokens_of_prompt()
        limit = body.get("max_completion_tokens", body.get("max_tokens")) if self.chat else body.get("max_tokens", 16)
        self._parts = merged(Generation(body, self.prompt, limit, rng).parts(), rng, merge)
        self._head = {
            "id": ("chatcmpl-" if self.chat else "cmpl-") + request_id,
            "object": "chat.completion.chunk" if self.chat else "text_completion",
            "created": rng.randrange(10**9),
            "model": "m",
        }
        self._ids = bool(body.get("return_token_ids"))
        self._options = body.get("stream_options") or {}

    def _tokens_of_prompt(self) -> list[int]:
        if self.chat:
            return [SPECIAL, *encode(self._body["messages"][-1]["content"])]
        prompt = self._body["prompt"]
        return encode(prompt) if isinstance(prompt, str) else list(prompt)

    def events(self) -> Iterator[bytes]:
        """The whole stream."""
        count, offset = 0, 0
        if self.chat:
            first = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            ids = {"prompt_token_ids": self.prompt if self._ids else None}
            yield self._event({**self._head, "choices": [first], **ids}, 0)
        for number, part in enumerate(self._parts):
            count += len(part.tokens)
            tokens = part.tokens if self._ids else None
            choice: dict[str, Any] = {"index": 0}
            if self.chat:
                choice |= {"delta": {"content": part.text}, "logprobs": None, "finish_reason": part.finish}
                choice |= {"stop_reason": part.stop} if part.finish else {}
            else:
                logprobs, offset = self._logprobs(part, offset)
                choice |= {"text": part.text, "logprobs": logprobs, "finish_reason": part.finish}
                shown = self.prompt if self._ids and not number else None
                choice |= {"stop_reason": part.stop, "prompt_token_ids": shown}
            yield self._event({**self._head, "choices": [{**choice, "token_ids": tokens}]}, count)
        if self._options.get("include_usage"):
            yield _line({**self._head, "choices": [], "usage": self._usage(count)})
        yield b"data: [DONE]\n\n"

    def _logprobs(self, part: Part, offset: int) -> tuple[dict[str, Any] | None, int]:
        if self._body.get("logprobs") is None:
            return None, offset
        tokens = [f"t{token}" for token in part.tokens]
        offsets = [offset + sum(map(len, tokens[:at])) for at in range(len(tokens))]
        nothing = [-0.5] * len(tokens)
        found = {"text_offset": offsets, "token_logprobs": nothing, "tokens": tokens, "top_logprobs": nothing}
        return found, offset + sum(map(len, tokens))

    def _usage(self, count: int) -> dict[str, int]:
        prompt = len(self.prompt)
        return {"prompt_tokens": prompt, "total_tokens": prompt + count, "completion_tokens": count}

    def _event(self, fields: dict[str, Any], count: int) -> bytes:
        if self._options.get("continuous_usage_stats"):
            fields["usage"] = self._usage(count)
        return _line(fields)


def _line(fields: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


@dataclass
class Heard:
    """What a client makes of a stream, however it was cut into events."""

    text: str = ""
    roles: int = 0
    finish: str | None = None
    stop: str | None = None
    tokens: list[int] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    logprobs: list[tuple[str, int]] = field(default_factory=list)
    usage: list[dict[str, int]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    done: int = 0
    error: str | None = None
    heads: set[str] = field(default_factory=set)
    ids_shown: bool = False


def hear(stream: bytes) -> Heard:
    """Read a stream as strictly as a client may."""
    heard = Heard()
    events = stream.split(b"\n\n")
    assert events.pop() == b"", "half an event"
    for event in events:
        assert heard.error is None, "something behind an error"
        assert not heard.done, "something behind [DONE]"
        assert event.startswith(b"data: "), event
        if event == b"data: [DONE]":
            heard.done += 1
            continue
        fields = json.loads(event[6:])
        if "error" in fields:
            heard.error = fields["error"]["code"]
            continue
        heard.heads.add(json.dumps([fields[name] for name in ("id", "object", "created", "model")]))
        if fields.get("prompt_token_ids") is not None:
            heard.prompts.append(fields["prompt_token_ids"])
        if not fields["choices"]:
            heard.usage.append(fields["usage"])
            continue
        if fields.get("usage"):
            heard.counts.append(fields["usage"]["completion_tokens"])
            assert fields["usage"]["prompt_tokens"] + heard.counts[-1] == fields["usage"]["total_tokens"]
        _take(heard, fields["choices"][0])
    return heard


def _take(heard: Heard, choice: dict[str, Any]) -> None:
    assert heard.finish is None, "something behind the end of the answer"
    delta = choice.get("delta", {})
    heard.roles += "role" in delta
    heard.text += choice.get("text") or delta.get("content") or ""
    heard.finish, heard.stop = choice["finish_reason"], choice.get("stop_reason")
    if choice.get("token_ids") is not None:
        heard.ids_shown = True
        heard.tokens += choice["token_ids"]
    if choice.get("prompt_token_ids") is not None:
        heard.prompts.append(choice["prompt_token_ids"])
    if choice.get("logprobs"):
        heard.logprobs += zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True)
