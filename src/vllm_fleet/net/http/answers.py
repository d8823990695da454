"""One answer out of a connection's bytes, as a client reads it. Sans-IO; heads and chunks are llhttp's, in its strict
mode."""

from __future__ import annotations

from dataclasses import dataclass

import httptools

from vllm_fleet.core import limits
from vllm_fleet.net.http.encoding import has_body
from vllm_fleet.net.http.messages import NotHttp
from vllm_fleet.net.http.reader import HEAD_END

UNTIL_CLOSE = -1
CHUNKED = -2


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """An answer's head; shared by all answers whose heads are the same bytes, so nobody changes it."""

    status: int
    pairs: list[tuple[str, str]]
    length: int
    """Of the body; UNTIL_CLOSE or CHUNKED where the head does not say."""
    keep_alive: bool


class _HeadTaker:
    """What llhttp calls while it reads a head."""

    def __init__(self) -> None:
        self.pairs: list[tuple[str, str]] = []
        self.complete = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.pairs.append((name.decode("latin-1"), value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        self.complete = True


class _ChunkTaker:
    """What llhttp calls while it reads chunks."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.complete = False
        self.more = False

    def on_message_begin(self) -> None:
        self.more = self.complete

    def on_body(self, part: bytes) -> None:
        self.parts.append(part)

    def on_message_complete(self) -> None:
        self.complete = True


def read_head(received: bytes) -> AnswerHead:
    """The head that is exactly ``received``.

    Raises:
        NotHttp: it is none, or one whose body has no clear end.
    """
    taker = _HeadTaker()
    parser = httptools.HttpResponseParser(taker)
    try:
        parser.feed_data(received)
    except httptools.HttpParserUpgrade as error:
        raise NotHttp("the server wants to speak something else") from error
    except httptools.HttpParserError as error:
        raise NotHttp(f"the answer is not HTTP/1.1: {error}") from error
    if not taker.complete:
        raise NotHttp("the answer's head has no end")
    if parser.get_http_version() not in ("1.0", "1.1"):
        raise NotHttp(f"the answer is HTTP/{parser.get_http_version()}")
    if len(taker.pairs) > limits.HEADERS_MAX:
        raise NotHttp(f"the answer has more than {limits.HEADERS_MAX} header lines")
    status = int(parser.get_status_code())
    length = UNTIL_CLOSE
    for name, value in taker.pairs:
        lowered = name.lower()
        if lowered == "content-length":  # at most one, and digits: llhttp sees to that
            length = int(value)
        elif lowered == "transfer-encoding":
            if value.strip().lower() != "chunked":
                raise NotHttp(f"the answer's transfer coding is {value[:40]!r}, not chunked")
            length = CHUNKED
    if not has_body(status):
        return AnswerHead(status, taker.pairs, 0, _keeps(parser.get_http_version(), taker.pairs))
    # Not llhttp's should_keep_alive: that is about this message's end, which only this module finds.
    keep_alive = length != UNTIL_CLOSE and _keeps(parser.get_http_version(), taker.pairs)
    return AnswerHead(status, taker.pairs, length, keep_alive)


def _keeps(version: str, pairs: list[tuple[str, str]]) -> bool:
    said = [value.lower() for name, value in pairs if name.lower() == "connection"]
    words = {word.strip() for value in said for word in value.split(",")}
    return "close" not in words and (version == "1.1" or "keep-alive" in words)


class AnswerHeads:
    """Heads read lately, by their bytes: an instance's answers within one second often have the same."""

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        self._kept: dict[bytes, AnswerHead] = {}

    def read(self, received: bytes) -> AnswerHead:
        """See read_head."""
        head = self._kept.get(received)
        if head is None:
            head = read_head(received)
            if len(received) <= limits.HTTP_HEAD_KEPT_BYTES_MAX:
                if len(self._kept) >= limits.HTTP_HEADS_KEPT:
                    self._kept.clear()
                self._kept[received] = head
        return head


class AnswerReader:
    """``head`` once it is here, ``parts`` of the body for the owner to take away, ``complete`` at its end.

    ``extra``: bytes came after the end; whatever they are, this connection is of no use any more.
    """

    __slots__ = ("_chunks", "_heads", "_left", "_parser", "_pending", "_to_head", "complete", "extra", "head", "parts")

    def __init__(self, heads: AnswerHeads, *, to_head: bool = False) -> None:
        """``to_head``: the question is HEAD, whose answers have no body."""
        self.head: AnswerHead | None = None
        self.parts: list[bytes] = []
        self.complete = self.extra = False
        self._heads, self._to_head = heads, to_head
        self._pending = b""
        self._left = 0
        self._chunks: _ChunkTaker | None = None
        self._parser: httptools.HttpResponseParser | None = None

    @property
    def began(self) -> bool:
        """Whether anything of an answer came."""
        return self.head is not None or bool(self._pending)

    def feed(self, data: bytes) -> None:
        """Read what arrived.

        Raises:
            NotHttp: it is no answer of HTTP/1.1.
        """
        while self.head is None:
            if self._pending:
                data, self._pending = self._pending + data, b""
            end = data.find(HEAD_END) + 4
            if end < 4 or end > limits.HEADER_BYTES_MAX:
                if max(len(data), end) > limits.HEADER_BYTES_MAX:
                    raise NotHttp(f"the answer's head is over {limits.HEADER_BYTES_MAX} bytes")
                self._pending = data
                return
            head = self._heads.read(data[:end])
            if head.status >= 200:
                self._begin(head, data[:end])
            data = data[end:]
            if not data:
                return
        if data:
            self._body(data)

    def on_close(self) -> bool:
        """The server closed the connection; whether that is this answer's end, and not in the middle of it."""
        if self.head is not None and self._left == UNTIL_CLOSE:
            self.complete = True
        return self.complete

    def _begin(self, head: AnswerHead, received: bytes) -> None:
        self.head = head
        self._left = 0 if self._to_head else head.length
        if self._left == 0:
            self.complete = True
        elif self._left == CHUNKED:
            self._chunks = _ChunkTaker()
            self._parser = httptools.HttpResponseParser(self._chunks)
            self._parser.feed_data(received)

    def _body(self, data: bytes) -> None:
        if self.complete:
            self.extra = True
        elif self._chunks is not None:
            self._feed_chunks(self._chunks, data)
        elif self._left == UNTIL_CLOSE:
            self.parts.append(data)
        else:
            if len(data) > self._left:
                self.extra = True
                data = data[: self._left]
            self._left -= len(data)
            self.parts.append(data)
            self.complete = self._left == 0

    def _feed_chunks(self, chunks: _ChunkTaker, data: bytes) -> None:
        assert self._parser is not None, "chunks have their parser"
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            if not chunks.complete:
                raise NotHttp(f"the answer's chunks are not HTTP/1.1: {error}") from error
            self.extra = True
        if chunks.parts:
            self.parts += chunks.parts
            chunks.parts.clear()
        self.complete = chunks.complete
        self.extra = self.extra or chunks.more
