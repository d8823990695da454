"""The requests in one connection's bytes, within bounds. Sans-IO; the parser is llhttp, in its strict mode."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable

import httptools

from vllm_fleet.core import limits
from vllm_fleet.net.http.messages import Answer, Explain, Head, Request, Rules

HEAD_END = b"\r\n\r\n"
_host = re.compile(rb"[A-Za-z0-9._~!$&'()*+;=%:\[\]-]*").fullmatch
_absolute = re.compile(r"[Hh][Tt][Tt][Pp][Ss]?://[^/?#]+").match
_other_method = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64} [\x21-\x7e]+ HTTP/1\.[01]\r\n").match


class Heads:
    """Heads that were read lately, by their bytes: those of a kept connection differ rarely, and not parsing them again
    saves half of what a small request costs. Shared by the connections of one server."""

    __slots__ = ("_kept", "_kept_max")

    def __init__(self, kept_max: int = limits.HTTP_HEADS_KEPT) -> None:
        self._kept: dict[bytes, Head] = {}
        self._kept_max = kept_max

    def get(self, received: bytes) -> Head | None:
        """What these bytes were read as, if they are a head that was accepted."""
        return self._kept.get(received)

    def put(self, received: bytes, head: Head) -> None:
        """Remember a head that was accepted."""
        if len(self._kept) >= self._kept_max:
            self._kept.clear()
        self._kept[received] = head


class RequestReader:
    """``requests``: the complete ones, in order, for the owner to take away.

    ``refused``: the answer to what came after them, once that cannot become a request; nothing later is read.
    ``refuse`` is asked before any of the body is kept (Service.refuse).
    """

    def __init__(
        self, rules: Rules, refuse: Callable[[Request], Answer | None], explain: Explain, peer: str, heads: Heads
    ) -> None:
        self.requests: deque[Request] = deque()
        self.refused: Answer | None = None
        self.body_bytes = 0
        """Of the request that is not complete: what came of its body."""
        self._rules, self._refuse, self._explain, self._peer, self._heads = rules, refuse, explain, peer, heads
        self._parser = httptools.HttpRequestParser(self)
        self._target = b""
        self._headers: dict[bytes, list[bytes]] = {}
        self._header_count = 0
        self._body: list[bytes] = []
        self._missing = 0  # bytes of a body whose head was known, and which llhttp does not see
        self._head_bytes = self._unfinished_bytes = 0
        self._began = self._expects = self._over = False
        self._request: Request | None = None
        self._first: Head | None = None  # of the piece that is being read

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
        if self._missing:
            data = self._rest_of_body(data)
        if not self._began and not self._over:
            data = self._known(data)
        if not data:
            return
        fresh, before = not self._began, len(self.requests)
        self._first = None
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._refuse_with(self._explain(400, "bad_request", "neither tunnels nor upgrades are offered here"))
        except httptools.HttpParserError as error:
            self._refuse_with(self._broken(data if fresh and len(self.requests) == before else b"", error))
        if self._began:
            self._unfinished_bytes += len(data)
            rules = self._rules
            if self.in_head and self._unfinished_bytes > rules.head_bytes_max:
                self._refuse_with(self._head_too_large(self._target or data))
            elif self._unfinished_bytes > rules.head_bytes_max + 2 * rules.body_bytes_max:
                # Twice the body: one in small chunks has more frame than content, one in tiny chunks is nobody's need.
                self._refuse_with(self._too_large())
        if fresh and self._first is not None and data[0] > 32:
            self._remember(data, self._first)

    def take_expectation(self) -> bool:
        """Whether the peer waits to be told that its body is welcome; said once."""
        expects, self._expects = self._expects, False
        return expects

    # Requests whose heads are known ----------------------------------------------------------------------------------

    def _known(self, data: bytes) -> bytes:
        """Take requests from the beginning of ``data`` as long as their heads are known; what is left."""
        while data and self.refused is None:
            start = data.find(HEAD_END) + 4
            if start < 4 or start > limits.HTTP_HEAD_KEPT_BYTES_MAX:
                break
            head = self._heads.get(data[:start])
            if head is None:
                break
            request = _request(head, self._peer)
            assert head.length is not None, "a head whose body comes in chunks is not remembered"
            missing = start + head.length - len(data)
            if missing > 0:
                self._began, self._missing, self._request = True, missing, request
                self._body.append(data[start:])
                self.body_bytes = len(data) - start
                return b""
            request.body = data[start : start + head.length]
            self._add(request)
            data = data[start + head.length :] if missing else b""
        return data

    def _rest_of_body(self, data: bytes) -> bytes:
        """What is left of ``data`` after the body of a request whose head was known."""
        part = data[: self._missing]
        self._body.append(part)
        self._missing -= len(part)
        self.body_bytes += len(part)
        if self._missing:
            return b""
        self._complete()
        return data[len(part) :]

    def _remember(self, data: bytes, head: Head) -> None:
        """``data`` begins with a head that llhttp read and nobody refused. Strict llhttp ends a head at the first empty
        line and nowhere else."""
        end = data.find(HEAD_END) + 4
        plain = head.keep_alive and head.length is not None and not head.expects
        if plain and 4 <= end <= limits.HTTP_HEAD_KEPT_BYTES_MAX:
            self._heads.put(data[:end], head)

    # Called by the parser; an exception here would come out of feed_data as a parser's error.

    def on_message_begin(self) -> None:
        self._began = self.refused is None

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
        target, headers = self._target.decode("latin-1"), self._headers
        if self._rules.public and (whole := _absolute(target)) is not None:
            target = target[whole.end() :]
            target = target if target.startswith("/") else "/" + target
        path, _, query = target.partition("?")
        method = self._parser.get_method().decode("latin-1")
        length = headers.get(b"content-length")  # at most one, and digits: llhttp sees to that
        size = None if b"transfer-encoding" in headers else int(length[0]) if length else 0
        in_chunks, keep_alive = self._parser.get_http_version() == "1.1", self._parser.should_keep_alive()
        expects = in_chunks and b"expect" in headers
        head = Head(method, path, query, headers, keep_alive, size, in_chunks, expects)
        request = _request(head, self._peer)
        answer = self._refused_by_head(head) or self._refuse(request)
        if answer is not None:
            self._refuse_with(answer)
            return
        if not self.requests:
            self._first = head
        self._request = request
        self._target, self._headers = b"", {}
        self._header_count = self._head_bytes = self._unfinished_bytes = 0
        self._expects, self._over = expects, not keep_alive

    def on_body(self, part: bytes) -> None:
        self.body_bytes += len(part)
        if self.body_bytes > self._rules.body_bytes_max:
            self._refuse_with(self._too_large())
        elif self.refused is None:
            self._body.append(part)

    def on_message_complete(self) -> None:
        if self.refused is None and self._request is not None:
            self._complete()

    def _complete(self) -> None:
        request, self._request = self._request, None
        assert request is not None, "a body ended whose head never came"
        if self._body:
            request.body = b"".join(self._body)
            self._body = []
        self.body_bytes = self._unfinished_bytes = 0
        self._began = self._expects = False
        self._add(request)

    def _add(self, request: Request) -> None:
        if len(self.requests) >= self._rules.pipeline_max:
            reason = "too many requests of this connection wait for an answer"
            self._refuse_with(self._explain(400, "bad_request", reason))
        elif self.refused is None:
            self.requests.append(request)

    # What is refused -------------------------------------------------------------------------------------------------

    def _refused_by_head(self, head: Head) -> Answer | None:
        rules = self._rules
        if self._head_bytes > rules.head_bytes_max or self._header_count > rules.headers_max:
            return self._head_too_large(self._target)
        if self._parser.should_upgrade() or not (
            head.path.startswith("/") or (rules.public and (head.method, head.path) == ("OPTIONS", "*"))
        ):
            return self._explain(400, "bad_request", "neither tunnels, upgrades nor proxying are offered here")
        if rules.public and (refused := self._refused_to_public(head)) is not None:
            return refused
        return self._too_large() if (head.length or 0) > rules.body_bytes_max else None

    def _refused_to_public(self, head: Head) -> Answer | None:
        if self._parser.get_http_version() not in ("1.0", "1.1"):
            return self._explain(505, "http_version", "HTTP/1.1 is spoken here")
        if len(self._target) > self._rules.target_bytes_max:
            return self._head_too_large(self._target)
        coding = head.headers.get(b"transfer-encoding")
        if coding is not None and not head.in_chunks:
            return self._explain(400, "bad_request", "HTTP/1.0 has no Transfer-Encoding")
        if coding is not None and [value.lower() for value in coding] != [b"chunked"]:
            return self._explain(501, "not_implemented", "the only transfer coding here is chunked")
        hosts = head.headers.get(b"host", [])
        if len(hosts) > 1 or (head.in_chunks and not hosts) or not all(_host(host) for host in hosts):
            return self._explain(400, "bad_request", "a request has exactly one Host")
        if head.expects and [value.lower() for value in head.headers[b"expect"]] != [b"100-continue"]:
            return self._explain(417, "expectation", "the only expectation here is 100-continue")
        return None

    def _broken(self, data: bytes, error: httptools.HttpParserError) -> Answer:
        """The answer to what llhttp would not read; ``data`` begins with a request, or is empty."""
        if self._rules.public:
            if "Invalid HTTP version" in str(error) or data.startswith(b"PRI * HTTP/2"):
                return self._explain(505, "http_version", "HTTP/1.1 is spoken here")
            if isinstance(error, httptools.HttpParserInvalidMethodError) and _other_method(data):
                return self._explain(501, "not_implemented", "this method is not known here")
            if "Request has invalid `Transfer-Encoding`" in str(error):
                return self._explain(501, "not_implemented", "the only transfer coding here is chunked")
        return self._explain(400, "bad_request", "this is not a request of HTTP/1.1")

    def _refuse_with(self, answer: Answer) -> None:
        if self.refused is None:
            self.refused = answer
            self._body, self._headers, self._request, self._first = [], {}, None, None
            self._began = False

    def _too_large(self) -> Answer:
        return self._explain(413, "too_large", f"a body may have {self._rules.body_bytes_max} bytes at most")

    def _head_too_large(self, target: bytes) -> Answer:
        rules = self._rules
        if len(target) > rules.target_bytes_max and b"\n" not in target[: rules.target_bytes_max]:
            return self._explain(414, "too_large", f"a target may have {rules.target_bytes_max} bytes at most")
        most = f"{rules.head_bytes_max} bytes and {rules.headers_max} lines"
        return self._explain(431, "too_large", f"a head may have {most} at most")


def _request(head: Head, peer: str) -> Request:
    return Request(head.method, head.path, head.query_text, head.headers, peer, head.keep_alive, head=head)
