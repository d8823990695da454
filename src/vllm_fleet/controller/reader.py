"""The requests in one connection's bytes, within bounds. Sans-IO; the parser is llhttp, in its strict mode."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import httptools

from vllm_fleet.controller.exchange import Answer, Request, refusal
from vllm_fleet.core import limits

UNFINISHED_BYTES_MAX = limits.CONTROL_HEAD_BYTES_MAX + 2 * limits.CONTROL_BODY_BYTES_MAX
"""Twice the body: a body in small chunks has more frame than content, and one in tiny chunks is nobody's need."""

REPEATED_BYTES_MAX = 2048
"""Longer requests are not remembered. A member's heartbeats are the same few hundred bytes for hours; not parsing them
again saves half of what they cost."""


class RequestReader:
    """``requests``: the complete ones, in order, for the owner to take away.

    ``refused``: the answer to what came after them, once that cannot become a request; nothing later is read.
    ``refuse`` is asked once for each head, before any of the body is kept.
    """

    def __init__(self, refuse: Callable[[Request], Answer | None], peer: str) -> None:
        self.requests: deque[Request] = deque()
        self.refused: Answer | None = None
        self.in_chunks = True
        """Whether the peer knows chunked answers."""
        self._refuse, self._peer = refuse, peer
        self._parser = httptools.HttpRequestParser(self)
        self._target = b""
        self._headers: dict[bytes, list[bytes]] = {}
        self._header_count = 0
        self._body: list[bytes] = []
        self._head_bytes = self._body_bytes = self._unfinished_bytes = 0
        self._began = self._expects = False
        self._request: Request | None = None
        self._whole: bytes | None = None  # the last piece that was one whole request, which is _same
        self._same = Request("", "", "", {}, "")

    @property
    def in_head(self) -> bool:
        """Whether a request has begun whose head is not complete."""
        return self._began and self._request is None

    @property
    def in_body(self) -> bool:
        """Whether the body of a request is not complete."""
        return self._request is not None

    def feed(self, data: bytes) -> None:
        """Read what arrived; never raises."""
        if self.refused is not None:
            return
        fresh = not self._began and not self.requests
        if fresh and data == self._whole:
            self.requests.append(self._same)  # byte for byte the request before: what was found in it is in it again
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._refuse_with(refusal(400, "bad_request", "this is not a request of HTTP/1.1"))
        if self._began:
            self._unfinished_bytes += len(data)
            if self.in_head and self._unfinished_bytes > limits.CONTROL_HEAD_BYTES_MAX:
                self._refuse_with(_head_too_large())
            elif self._unfinished_bytes > UNFINISHED_BYTES_MAX:
                self._refuse_with(_too_large())
        elif fresh and len(self.requests) == 1 and len(data) <= REPEATED_BYTES_MAX and self.requests[0].keep_alive:
            self._whole, self._same = data, self.requests[0]

    def take_expectation(self) -> bool:
        """Whether the peer waits to be told that its body is welcome; said once."""
        expects, self._expects = self._expects, False
        return expects

    # Called by the parser; an exception here would come out of feed_data as a parser's error.

    def on_message_begin(self) -> None:
        self._began = True

    def on_url(self, part: bytes) -> None:
        self._target += part
        self._head_bytes += len(part)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._request is None:  # else a trailer, which nobody needs
            self._headers.setdefault(name.lower(), []).append(value)
            self._header_count += 1
            self._head_bytes += len(name) + len(value)

    def on_headers_complete(self) -> None:
        if self.refused is not None:
            return
        path, _, query = self._target.decode("latin-1").partition("?")
        method = self._parser.get_method().decode("latin-1")
        request = Request(method, path, query, self._headers, self._peer, self._parser.should_keep_alive())
        answer = self._refused_by_head(request) or self._refuse(request)
        if answer is not None:
            self._refuse_with(answer)
            return
        self._request = request
        self._target, self._headers = b"", {}
        self._header_count = self._head_bytes = self._unfinished_bytes = 0
        self.in_chunks = self._parser.get_http_version() == "1.1"
        self._expects = self.in_chunks and bool(request.values(b"expect"))

    def on_body(self, part: bytes) -> None:
        self._body_bytes += len(part)
        if self._body_bytes > limits.CONTROL_BODY_BYTES_MAX:
            self._refuse_with(_too_large())
        elif self.refused is None:
            self._body.append(part)

    def on_message_complete(self) -> None:
        request, self._request = self._request, None
        if self.refused is not None or request is None:
            return
        if self._body:
            request.body = b"".join(self._body)
            self._body = []
        self._body_bytes = self._unfinished_bytes = 0
        self._began = self._expects = False
        if len(self.requests) >= limits.CONTROL_PIPELINE_MAX:
            self._refuse_with(refusal(400, "bad_request", "too many requests of this connection wait for an answer"))
        else:
            self.requests.append(request)

    def _refused_by_head(self, request: Request) -> Answer | None:
        if self._head_bytes > limits.CONTROL_HEAD_BYTES_MAX or self._header_count > limits.HEADERS_MAX:
            return _head_too_large()
        if self._parser.should_upgrade() or not request.path.startswith("/"):
            return refusal(400, "bad_request", "neither tunnels, upgrades nor proxying are offered here")
        length = request.values(b"content-length")  # at most one, and digits: llhttp sees to that
        return _too_large() if length and int(length[0]) > limits.CONTROL_BODY_BYTES_MAX else None

    def _refuse_with(self, answer: Answer) -> None:
        if self.refused is None:
            self.refused = answer
            self._body, self._headers, self._request = [], {}, None
            self._began = False


def _too_large() -> Answer:
    return refusal(413, "too_large", f"a body may have {limits.CONTROL_BODY_BYTES_MAX} bytes at most")


def _head_too_large() -> Answer:
    most = f"{limits.CONTROL_HEAD_BYTES_MAX} bytes and {limits.HEADERS_MAX} lines"
    return refusal(431, "too_large", f"a head may have {most} at most")
