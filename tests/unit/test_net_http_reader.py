"""Requests of anybody's clients out of bytes: what RFC 9110 and 9112 ask of a server that the public can reach."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_fleet.core import limits
from vllm_fleet.net.http.messages import Answer, Request, Rules
from vllm_fleet.net.http.reader import Heads, RequestReader

RULES = Rules(
    head_bytes_max=4000,
    body_bytes_max=5000,
    pipeline_max=4,
    head_s=1,
    body_s=1,
    idle_s=1,
    write_s=1,
    linger_s=1,
    backlog=1,
    connections_max=1,
    files_kept=0,
    target_bytes_max=1000,
    public=True,
)
GET = b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n"
POST = b"POST /b HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\nbody"
HEAD = b"POST / HTTP/1.1\r\nHost: h\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def explain(status: int, code: str, text: str) -> Answer:
    return Answer(status, text.encode())


def reader(heads: Heads | None = None) -> RequestReader:
    return RequestReader(RULES, lambda _: None, explain, "peer", heads or Heads())


def read(*pieces: bytes, heads: Heads | None = None) -> RequestReader:
    one = reader(heads)
    for piece in pieces:
        one.feed(piece)
    return one


def status(one: RequestReader) -> int | None:
    return None if one.refused is None else one.refused.status


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # Versions
        (b"GET / HTTP/2.0\r\nHost: h\r\n\r\n", 505),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (b"GET / HTTP/1.2\r\nHost: h\r\n\r\n", 505),
        (b"GET /\r\n\r\n", 505),
        # Lines
        (b"GET / HTTP/1.1\nHost: h\n\n", 400),
        (b"GET / HTTP/1.1\r\nHost: h\nA: b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: h\r\nA: b\rc\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: h\r\nA: b\x00c\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: h\r\nA: b\x01c\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost : h\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n Host: h\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: h\r\nA: b\r\n c\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: h\r\nA\xff: b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: h\r\n: b\r\n\r\n", 400),
        (b"GET /a b HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x00", 400),
        (b"BREW / HTTP/1.1\r\nHost: h\r\n\r\n", 501),
        # Host
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: h\r\nHost: h\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
        # Lengths that two readers could understand in two ways
        (HEAD + b"Content-Length: 4\r\nContent-Length: 4\r\n\r\nbody", 400),
        (HEAD + b"Content-Length: 4, 4\r\n\r\nbody", 400),
        (HEAD + b"Content-Length: +4\r\n\r\nbody", 400),
        (HEAD + b"Content-Length: 0x4\r\n\r\nbody", 400),
        (HEAD + b"Content-Length:\r\n\r\nbody", 400),
        (HEAD + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 501),
        (HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
        (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        # Chunks
        (CHUNKED + b"4\nbody\r\n0\r\n\r\n", 400),
        (CHUNKED + b"4 \r\nbody\r\n0\r\n\r\n", 400),
        (CHUNKED + b"0x4\r\nbody\r\n0\r\n\r\n", 400),
        (CHUNKED + b"-4\r\nbody\r\n0\r\n\r\n", 400),
        (CHUNKED + b"4\r\nbodyX\r\n0\r\n\r\n", 400),
        (CHUNKED + b"fffffffffffffffff\r\n", 400),
        # Too much
        (HEAD + b"Content-Length: 5001\r\n\r\n", 413),
        (HEAD + b"Content-Length: 99999999999999999999\r\n\r\n", 400),
        (CHUNKED + b"1000\r\n" + b"x" * 0x1000 + b"\r\n1000\r\n" + b"x" * 0x1000 + b"\r\n", 413),
        (CHUNKED + b"1;" + b"x" * 20_000, 413),
        (CHUNKED + b"0\r\n" + b"A: b\r\n" * 5000, 413),
        (b"GET /" + b"x" * 1000 + b" HTTP/1.1\r\nHost: h\r\n\r\n", 414),
        (b"GET /" + b"x" * 9000, 414),
        (b"GET / HTTP/1.1\r\nHost: h\r\nA: " + b"x" * 4000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: h\r\n" + b"A: b\r\n" * limits.HEADERS_MAX + b"\r\n", 431),
        # Other things that are not done here
        (HEAD + b"Expect: 200-ok\r\nContent-Length: 4\r\n\r\n", 417),
        (b"CONNECT h:80 HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", 400),
        (b"GET * HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b"GET ftp://h/ HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    ],
)
def test_what_is_refused(given: bytes, expected: int) -> None:
    whole = read(given)
    assert (status(whole), list(whole.requests)) == (expected, [])
    assert status(read(*(given[at : at + 100] for at in range(0, len(given), 100)))) == expected
    after = read(GET + given)
    assert len(after.requests) == 1
    assert status(after) in (expected, 400 if expected > 500 else expected), "why may be unclear behind another request"


@pytest.mark.parametrize(
    ("given", "path", "query"),
    [
        (b"GET http://h:80/a?b HTTP/1.1\r\nHost: h\r\n\r\n", "/a", "b"),
        (b"GET HTTP://h HTTP/1.1\r\nHost: h\r\n\r\n", "/", ""),
        (b"GET http://h?b HTTP/1.1\r\nHost: h\r\n\r\n", "/", "b"),
        (b"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n", "*", ""),
        (b"GET //a HTTP/1.1\r\nHost:\r\n\r\n", "//a", ""),
        (b"\r\n\r\nGET /a HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", "/a", ""),
        (b"GET /a HTTP/1.0\r\n\r\n", "/a", ""),
    ],
)
def test_what_is_taken(given: bytes, path: str, query: str) -> None:
    [request] = read(given).requests
    assert (request.path, request.query_text) == (path, query)


def test_chunks_and_their_extensions_and_trailers() -> None:
    one = read(CHUNKED + b"4;a=b\r\nbody\r\n3\r\nmor\r\n0\r\nHost: other\r\n\r\n" + GET)
    assert [request.body for request in one.requests] == [b"bodymor", b""]
    assert one.requests[0].values(b"host") == [b"h"]


def test_headers_as_text() -> None:
    [request] = read(GET[:-2] + b"A: 1\r\na: 2\r\nB: \xe9\r\n\r\n").requests
    assert request.text() == {"host": "h", "a": "1, 2", "b": "é"}
    assert request.text() is request.text()


# Heads that are known ------------------------------------------------------------------------------------------------


def test_a_known_head_is_read_the_same_in_every_cut() -> None:
    heads = Heads()
    whole = POST + GET + POST.replace(b"body", b"fish")
    expected = [(r.method, r.path, r.body, r.text()) for r in read(whole, heads=heads).requests]
    read(POST, heads=heads)
    read(GET, heads=heads)
    assert heads.get(POST[:-4]) is not None
    for cut in range(len(whole) + 1):
        one = read(whole[:cut], whole[cut:], heads=heads)
        assert [(r.method, r.path, r.body, r.text()) for r in one.requests] == expected, cut
        assert (one.in_head, one.in_body, one.refused) == (False, False, None)
    one = read(*(whole[at : at + 1] for at in range(len(whole))), heads=heads)
    assert [(r.method, r.path, r.body, r.text()) for r in one.requests] == expected


@pytest.mark.parametrize(
    "given",
    [
        CHUNKED + b"0\r\n\r\n",
        GET.replace(b"Host", b"Connection: close\r\nHost"),
        POST.replace(b"Host", b"Expect: 100-continue\r\nHost"),
        b"\r\n\r\n" + GET,
        b"GET /" + b"x" * 900 + b" HTTP/1.1\r\nHost: h\r\nA: " + b"x" * 2000 + b"\r\n\r\n",
    ],
)
def test_heads_that_are_not_remembered(given: bytes) -> None:
    heads = Heads()
    assert len(read(given, heads=heads).requests) == 1
    assert heads._kept == {}


def test_what_was_refused_is_not_remembered() -> None:
    heads = Heads()
    one = RequestReader(RULES, lambda _: explain(404, "", ""), explain, "peer", heads)
    one.feed(GET)
    assert (status(one), heads._kept) == (404, {})


def test_nothing_counts_after_the_last_request_of_a_connection() -> None:
    heads = Heads()
    read(GET, heads=heads)
    one = read(GET.replace(b"Host", b"Connection: close\r\nHost"), GET, heads=heads)
    assert (len(one.requests), status(one)) == (1, 400)


def test_few_requests_may_wait_known_or_not() -> None:
    heads = Heads()
    for _ in range(2):
        one = read(GET * (RULES.pipeline_max + 3), heads=heads)
        assert (len(one.requests), status(one)) == (RULES.pipeline_max, 400)


def test_few_heads_are_remembered() -> None:
    heads = Heads()
    for number in range(3 * limits.HTTP_HEADS_KEPT):
        read(b"GET /%d HTTP/1.1\r\nHost: h\r\n\r\n" % number, heads=heads)
        assert 1 <= len(heads._kept) <= limits.HTTP_HEADS_KEPT


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from([POST, GET, POST[:-4], b"body", CHUNKED, b"\r\n", b"0\r\n\r\n", b"4\r\nbody\r\n"])
        | st.binary(max_size=40)
    ),
    st.integers(1, 60),
)
def test_what_is_remembered_makes_no_difference(pieces: list[bytes], size: int) -> None:
    given, heads = b"".join(pieces), Heads()
    for known in (GET, POST):
        read(known, heads=heads)
    cut = [given[at : at + size] for at in range(0, len(given), size)]
    with_heads, without = read(*cut, heads=heads), read(*(given[at : at + 1] for at in range(len(given))))
    assert [(r.method, r.path, r.body) for r in with_heads.requests] == [
        (r.method, r.path, r.body) for r in without.requests
    ]
    assert (status(with_heads) is None) == (status(without) is None)


def test_the_service_is_asked_before_the_body() -> None:
    asked: list[Request] = []

    def refuse(request: Request) -> Answer | None:
        asked.append(request)
        return explain(401, "", "")

    one = RequestReader(RULES, refuse, explain, "peer", Heads())
    one.feed(POST[:-4])
    assert (status(one), len(asked)) == (401, 1)
