"""The second half of a stream: another instance's events as the first one would have written them. Pure.

What the client has already is left out and compared; ids, counts and offsets go on where the first half ended; a
completion's events become a chat's where the client asked for a chat. Tokens' ids stay in: the stream's Tracker
follows these events like the first ones, so that they can be resumed in their turn.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Raw

from vllm_fleet.router import resume_events as ev
from vllm_fleet.router.resume import Resumption
from vllm_fleet.router.resume_track import Tracker

_NULL = Raw(b"null")
_LEAP = 64  # characters that one token may have, and some


class Mismatch(Exception):
    """The second instance does not write what the first one wrote: nothing may be joined."""


class Join:
    """Maps one instance's events."""

    def __init__(self, resumption: Resumption, sent: Tracker) -> None:
        self._sent, self._replay = sent, resumption.way == "replay"
        self._role_due = self._replay and sent.role_sent
        self._base, self._offset = resumption.base, resumption.offset
        self._expected, self._texts = list(resumption.expected), resumption.texts
        self._suspicious = not resumption.clean

    def take(self, events: bytes) -> bytes:
        """Some whole events of the second instance's; those for the client.

        Raises:
            Mismatch: they are no continuation.
        """
        if self._replay and not (self._expected or self._texts or self._role_due):
            return self._renamed(events)
        parts: list[bytes] = []
        for body in ev.bodies(events):
            try:
                event = ev.decode(body)
                parts.append(self._event(event, body))
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                raise Mismatch(f"an event of {len(body)} bytes that cannot be read") from error
        if b"data: [DONE]" in events:
            parts.append(ev.DONE)
        return b"".join(parts)

    def _event(self, event: ev.Event, body: bytes) -> bytes:
        if event.error is not None:
            return b"data: " + body + b"\n\n"
        if not event.choices:
            return self._usage_event(event, body)
        choice = event.choices[0]
        if self._role_due and choice.token_ids is None and _names_role(choice):
            self._role_due = False
            return b""
        if choice.token_ids is None:
            raise Mismatch("an event without token ids")
        old = self._skip(choice)
        leap = self._skip_text(choice)
        if self._suspicious and leap > _LEAP * (len(choice.token_ids) + 1):
            raise Mismatch("the text begins anew")
        self._suspicious = self._suspicious and not leap
        if old == len(choice.token_ids) > 0 and choice.finish_reason is None and not choice.shown():
            return b""
        if old and self._replay and choice.delta is not None and choice.delta.parsed():
            raise Mismatch("an event of a parser's that is half old")
        tokens = choice.token_ids[old:]
        if self._replay:
            return self._replayed(body, choice, old, tokens)
        return self._continued(event, choice, old, tokens)

    def _skip(self, choice: ev.Choice) -> int:
        """How many tokens of this event the client has; they must be the same."""
        assert choice.token_ids is not None, "only events with tokens come here"
        old = min(len(choice.token_ids), len(self._expected))
        if choice.token_ids[:old] != self._expected[:old]:
            raise Mismatch("other tokens than before")
        del self._expected[:old]
        return old

    def _skip_text(self, choice: ev.Choice) -> int:
        """Leave out the characters that the client has. Returns how many characters came."""
        text = choice.shown()
        if self._texts and text:
            cut = min(self._texts, len(text))
            self._texts -= cut
            if choice.delta is not None:
                choice.delta.content = text[cut:]
            else:
                choice.text = text[cut:]
        return len(text)

    # Writing -----------------------------------------------------------------------------------------------------

    def _renamed(self, events: bytes) -> bytes:
        """Events of a replay that the client has nothing of yet: only the time of creation differs."""
        parts = [self._rename(body) for body in ev.bodies(events)]
        if b"data: [DONE]" in events:
            parts.append(ev.DONE)
        return b"".join(parts)

    def _rename(self, body: bytes) -> bytes:
        at = body.find(b'"created":')
        if at < 0:
            return b"data: " + body + b"\n\n"
        begin = end = at + len(b'"created":')
        while body[end : end + 1].isdigit():
            end += 1
        return b"data: " + body[:begin] + str(self._sent.created).encode() + body[end:] + b"\n\n"

    def _replayed(self, body: bytes, choice: ev.Choice, old: int, tokens: list[int]) -> bytes:
        """An event of a replay: as it came, or what is new in it."""
        fields: dict[str, Any] = ev.decode_any(body)
        first = fields["choices"][0]
        if choice.delta is not None and "content" in first["delta"]:
            first["delta"]["content"] = choice.delta.content
        elif choice.delta is None:
            first["text"] = choice.text
        first["token_ids"] = tokens
        first["logprobs"] = _later_logprobs(first.get("logprobs"), old)
        if self._sent.created:
            fields["created"], fields["id"] = self._sent.created, self._sent.id
        return ev.write(fields)

    def _continued(self, event: ev.Event, choice: ev.Choice, old: int, tokens: list[int]) -> bytes:
        """An event of a continuation, in the client's kind of stream."""
        sent = self._sent
        written: dict[str, Any] = {"index": 0}
        reason = choice.finish_reason
        if sent.chat:
            written |= {"delta": {"content": choice.text or ""}, "logprobs": None, "finish_reason": reason}
            if reason is not None:
                written["stop_reason"] = choice.stop_reason
        else:
            written |= {"text": choice.text or "", "logprobs": self._moved(choice.logprobs, old)}
            written |= {"finish_reason": reason, "stop_reason": choice.stop_reason, "prompt_token_ids": None}
        written["token_ids"] = tokens
        kind = "chat.completion.chunk" if sent.chat else "text_completion"
        fields: dict[str, Any] = {"id": sent.id, "object": kind, "created": sent.created, "model": sent.model}
        fields["choices"] = [written]
        if bytes(event.system_fingerprint) != b"null":
            fields["system_fingerprint"] = event.system_fingerprint
        if bytes(event.usage) != b"null":
            fields["usage"] = self._usage(event.usage)
        return ev.write(fields)

    def _moved(self, logprobs: Raw, old: int) -> object:
        """A completion's logprobs, their offsets counted from the beginning of the answer."""
        if bytes(logprobs) == b"null":
            return None
        found: dict[str, Any] = _later_logprobs(ev.decode_any(logprobs), old)
        found["text_offset"] = [offset + self._offset for offset in found["text_offset"]]
        return found

    def _usage_event(self, event: ev.Event, body: bytes) -> bytes:
        if self._replay:
            return self._rename(body)
        fields: dict[str, Any] = ev.decode_any(body)
        sent = self._sent
        fields |= {"id": sent.id, "created": sent.created, "model": sent.model}
        fields["object"] = "chat.completion.chunk" if sent.chat else "text_completion"
        fields["usage"] = self._usage(event.usage)
        return ev.write(fields)

    def _usage(self, usage: Raw) -> dict[str, Any]:
        """Counted as one answer: the client's prompt, and all its tokens."""
        found: dict[str, Any] = ev.decode_any(usage)
        prompt = len(self._sent.prompt or ())
        tokens = self._base + int(found.get("completion_tokens", 0))
        details = found.get("prompt_tokens_details")
        if isinstance(details, dict) and isinstance(cached := details.get("cached_tokens"), int):
            details["cached_tokens"] = min(cached, prompt)  # of a prompt that held a part of the answer, too
        return {**found, "prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}


def _names_role(choice: ev.Choice) -> bool:
    return choice.delta is not None and choice.delta.role is not None


def _later_logprobs(logprobs: Any, old: int) -> Any:
    """Without the entries of the first ``old`` tokens."""
    if not old or not isinstance(logprobs, dict):
        return logprobs
    return {name: value[old:] if isinstance(value, list) else value for name, value in logprobs.items()}


def ending(sent: Tracker, *, usage: bool) -> bytes:
    """The end of a stream whose answer is complete but for what comes after it."""
    fields: dict[str, Any] = {
        "id": sent.id,
        "object": "chat.completion.chunk" if sent.chat else "text_completion",
        "created": sent.created,
        "model": sent.model,
        "choices": [],
    }
    prompt, tokens = len(sent.prompt or ()), len(sent.tokens)
    fields["usage"] = {"prompt_tokens": prompt, "total_tokens": prompt + tokens, "completion_tokens": tokens}
    return (ev.write(fields) if usage and not sent.usage_sent else b"") + ev.DONE
