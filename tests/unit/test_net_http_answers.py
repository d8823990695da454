"""An answer out of bytes, as a client reads it: whole or in pieces, with a clear end or refused."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_fleet.core import limits
from vllm_fleet.net.http.answers import AnswerHeads, AnswerReader
from vllm_fleet.net.http.messages import NotHttp

OK = b"HTTP/1.1 200 OK\r\n"
LONG = OK + b"Content-Length: 5\r\n\r\nhello"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\nT: t\r\n\r\n"
OPEN = OK + b"X: y\r\n\r\nhello"


def read(*pieces: bytes, heads: AnswerHeads | None = None, to_head: bool = False) -> AnswerReader:
    reader = AnswerReader(heads or AnswerHeads(), to_head=to_head)
    for piece in pieces:
        reader.feed(piece)
    return reader


@pytest.mark.parametrize(
    "given", [LONG, CHUNKED, OPEN, b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\n\r\n" + LONG]
)
def test_pieces_make_no_difference(given: bytes) -> None:
    heads = AnswerHeads()
    for cut in range(len(given) + 1):
        reader = read(given[:cut], given[cut:], heads=heads)
        assert reader.head is not None
        assert (reader.head.status, b"".join(reader.parts), reader.extra) == (200, b"hello", False)
        assert reader.complete == (given is not OPEN)
        assert reader.on_close()
        assert reader.head.keep_alive == (given is not OPEN)
    one_by_one = read(*(given[at : at + 1] for at in range(len(given))))
    assert (b"".join(one_by_one.parts), one_by_one.extra) == (b"hello", False)


@pytest.mark.parametrize(
    ("given", "keep_alive"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", True),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 100\r\n\r\n", True),
        (OK + b"Content-Length: 0\r\n\r\n", True),
        (OK + b"Content-Length: 0\r\nConnection: x, Close\r\n\r\n", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\nConnection: keep-alive\r\n\r\n", True),
    ],
)
def test_answers_without_a_body(given: bytes, keep_alive: bool) -> None:
    reader = read(given)
    assert reader.head is not None
    assert (reader.complete, reader.parts, reader.head.keep_alive) == (True, [], keep_alive)


def test_an_answer_to_head_has_no_body() -> None:
    for head in (LONG[:-5], CHUNKED[: CHUNKED.index(b"2\r\n")]):
        assert read(head, to_head=True).complete


@pytest.mark.parametrize("given", [LONG, CHUNKED])
def test_what_comes_after_the_end_is_noticed(given: bytes) -> None:
    for reader in (read(given + OK), read(given, OK), read(given + b"\x00"), read(given, b"\x00")):
        assert (reader.complete, reader.extra, b"".join(reader.parts)) == (True, True, b"hello")


@pytest.mark.parametrize("given", [LONG, CHUNKED])
def test_an_end_in_the_middle_is_noticed(given: bytes) -> None:
    for cut in range(len(given)):
        assert not read(given[:cut]).on_close()


@pytest.mark.parametrize(
    "given",
    [
        b"SSH-2.0-x\r\n\r\n",
        b"HTTP/2.0 200 OK\r\n\r\n",
        b"HTTP/1.1 99 no\r\n\r\n",
        b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        OK + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
        OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        OK + b"Content-Length: -5\r\n\r\n",
        OK + b"Transfer-Encoding: gzip\r\n\r\n",
        OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        OK + b"A: b\r\n c\r\n\r\n",
        OK + b"A: b\x00\r\n\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\nx\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhelloX\r\n",
        OK + b"A: " + b"x" * limits.HEADER_BYTES_MAX,
        OK + b"A: b\r\n" * (limits.HEADERS_MAX + 1) + b"\r\n",
    ],
)
def test_what_is_no_answer(given: bytes) -> None:
    with pytest.raises(NotHttp):
        read(given)
    with pytest.raises(NotHttp):
        read(*(given[at : at + 1] for at in range(len(given))))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([LONG, CHUNKED, OK, b"\r\n", b"0\r\n\r\n"]) | st.binary(max_size=40)))
def test_no_bytes_raise_anything_else(pieces: list[bytes]) -> None:
    with contextlib.suppress(NotHttp):
        read(*pieces)
