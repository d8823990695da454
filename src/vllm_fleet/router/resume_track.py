"""What a client has got of a stream, token by token, so that another instance can go on with it. Pure.

The stream's bytes pass through: the token ids, which the router asked for and the client did not, are cut out, and the
events are kept as they came. They are read in batches, or when the stream breaks; most streams are never read at all.
"""

from __future__ import annotations

from array import array

import msgspec

from vllm_fleet.core import limits
from vllm_fleet.router import resume_events as ev


class Tracker:
    """One stream."""

    __slots__ = (
        "_raw",
        "_raw_len",
        "_strip",
        "broken",
        "chat",
        "created",
        "error",
        "fingerprint",
        "finished",
        "id",
        "mark_offsets",
        "mark_texts",
        "mark_tokens",
        "model",
        "parsed",
        "prompt",
        "role_sent",
        "tokens",
        "usage_sent",
    )

    def __init__(self, *, chat: bool, strip: bool) -> None:
        """``strip``: the client did not ask for token ids."""
        self._strip = strip
        self._raw: list[bytes] = []
        self._raw_len = 0
        self.chat = chat
        self.broken = False
        """Something came that cannot be followed: no token ids, several choices, no JSON."""
        self.error: ev.ErrorBody | None = None
        """The instance's own error, at the end of what it sent."""
        self.finished = False
        """The client knows why the answer ended."""
        self.parsed = False
        """A parser of the instance's took part: tokens are not text."""
        self.role_sent = self.usage_sent = False
        self.id, self.model, self.created, self.fingerprint = "", "", 0, b"null"
        self.prompt: array[int] | None = None
        self.tokens = array("I")
        self.mark_tokens, self.mark_texts = array("I", (0,)), array("I", (0,))
        """Tokens and characters that the client had after each event with tokens."""
        self.mark_offsets = array("I", (0,))
        """... and where its next logprobs begin."""

    def take(self, events: bytes) -> bytes:
        """Some whole events; what the client gets of them. ``error`` is set if an instance's error ended them."""
        if b'data: {"error"' in events and (found := self._split(events)) is not None:
            events = found
        self._raw.append(events)
        self._raw_len += len(events)
        if self._raw_len > limits.RESUME_BUFFER_BYTES:
            self.read()
        return ev.without_token_ids(events) if self._strip else events

    def _split(self, events: bytes) -> bytes | None:
        """What came before an error of the instance's; None: it is the client's error, or none at all."""
        at = 0 if events.startswith(b'data: {"error"') else events.find(b'\n\ndata: {"error"') + 2
        for body in ev.bodies(events[at:]):
            try:
                error = ev.decode(body).error
            except (msgspec.MsgspecError, UnicodeDecodeError):
                return None
            if error is None or (isinstance(error.code, int) and 400 <= error.code < 500):
                return None
            self.error = error
            return events[:at]
        return None

    def read(self) -> None:
        """Take in what was kept."""
        raw, self._raw, self._raw_len = b"".join(self._raw), [], 0
        if self.broken:
            return
        try:
            for event in ev.decode_many(b"[%b]" % b",".join(ev.bodies(raw))):
                self._event(event)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError):
            self.broken = True
        if len(self.tokens) + len(self.prompt or ()) > limits.RESUME_TOKENS_MAX:
            self.broken = True
        if self.broken:
            self.tokens, self.prompt = array("I"), None

    def _event(self, event: ev.Event) -> None:
        if not self.id:
            self.id, self.model, self.created = event.id, event.model, event.created
        if event.prompt_token_ids is not None:
            self.prompt = array("I", event.prompt_token_ids)
        if not event.choices:
            self.usage_sent = self.usage_sent or bytes(event.usage) != b"null"
            return
        choice = event.choices[0]
        if len(event.choices) > 1 or choice.index:
            self.broken = True
            return
        tokens = choice.token_ids
        if choice.prompt_token_ids is not None:
            self.prompt = array("I", choice.prompt_token_ids)
        if choice.delta is not None:
            self.parsed = self.parsed or choice.delta.parsed() or choice.delta.empty()
            if choice.delta.role is not None and tokens is None:
                self.role_sent = True
                return
        if tokens is None:
            self.broken = True  # an instance that does not know return_token_ids
            return
        self.tokens.extend(tokens)
        self.mark_tokens.append(len(self.tokens))
        self.mark_texts.append(self.mark_texts[-1] + len(choice.shown()))
        offset = self.mark_offsets[-1]
        if not self.chat and bytes(choice.logprobs) != b"null":
            logprobs = ev.decode_logprobs(choice.logprobs)
            if logprobs.tokens:
                offset = logprobs.text_offset[-1] + len(logprobs.tokens[-1])
        self.mark_offsets.append(offset)
        self.finished = self.finished or choice.finish_reason is not None

    def forget(self, mark: int, texts: int) -> None:
        """Tokens after this mark will be drawn anew; the client has ``texts`` characters."""
        del self.tokens[self.mark_tokens[mark] :]
        for marks in (self.mark_tokens, self.mark_texts, self.mark_offsets):
            del marks[mark + 1 :]
        self.mark_texts[mark] = texts
