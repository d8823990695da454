"""Answers and requests as bytes. Pure."""

from __future__ import annotations

from http import HTTPStatus

from vllm_fleet.core.errors import Bug
from vllm_fleet.net.http.messages import Answer, Pairs

STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
_HAS_NO_BODY = frozenset({204, 304})


def has_body(status: int) -> bool:
    """Whether answers of this status have a body at all."""
    return status >= 200 and status not in _HAS_NO_BODY


def status_line(status: int) -> bytes:
    """The first line; a status that has no name gets none."""
    return STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status


def encode_lines(pairs: Pairs) -> bytes:
    """Header lines.

    Raises:
        Bug: a value would end its line, and so could forge another.
    """
    lines = "".join([f"{name}: {value}\r\n" for name, value in pairs])
    count = len(pairs)
    if lines.count("\n") != count or lines.count("\r") != count or "\0" in lines:
        raise Bug("a header to be sent holds the end of a line")
    return lines.encode("latin-1", "replace")


def encode_answer(answer: Answer, *, keep_alive: bool = True, with_body: bool = True, more: bytes = b"") -> bytes:
    """An answer's bytes; ``with_body`` is false where the question was HEAD; ``more``: further header lines."""
    lines = encode_lines(answer.headers) + more if answer.headers else more
    if not keep_alive:
        lines += b"Connection: close\r\n"
    if answer.status == 204:
        return b"%b%b\r\n" % (STATUS_LINES[204], lines)
    head = b"Content-Type: %b\r\nContent-Length: %d\r\n%b\r\n" % (answer.content_type.encode(), len(answer.body), lines)
    return status_line(answer.status) + head + (answer.body if with_body else b"")
