"""Requests out of bytes: whole or in pieces, within bounds, whatever the bytes are."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_fleet.controller.exchange import refusal
from vllm_fleet.controller.http import RULES
from vllm_fleet.core import limits
from vllm_fleet.net.http.messages import Answer, Request
from vllm_fleet.net.http.reader import Heads, RequestReader

POST = b"POST /v1/members?a=1&b=%20x HTTP/1.1\r\nHost: h\r\nX-Twice: 1\r\nx-twice: 2\r\nContent-Length: 4\r\n\r\nbody"
GET = b"GET /health HTTP/1.1\r\nHost: h\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"


def reader() -> RequestReader:
    return RequestReader(RULES, lambda _: None, refusal, "peer", Heads())


def read(*pieces: bytes) -> RequestReader:
    one = reader()
    for piece in pieces:
        one.feed(piece)
    return one


def refused(one: RequestReader) -> int | None:
    return None if one.refused is None else one.refused.status


def test_a_request_is_read() -> None:
    one = read(POST)
    [request] = one.requests
    assert (request.method, request.path, request.body, request.peer) == ("POST", "/v1/members", b"body", "peer")
    assert request.values(b"x-twice") == [b"1", b"2"]
    assert (request.query("a"), request.query("b"), request.query("c"), request.count("a")) == ("1", " x", None, 1)
    assert request.keep_alive
    assert (one.in_head, one.in_body, one.refused) == (False, False, None)


def test_pieces_make_no_difference() -> None:
    whole = POST + GET + CHUNKED + b"2\r\nab\r\n1\r\nc\r\n0\r\nTrailer: t\r\n\r\n"
    expected = list(read(whole).requests)
    assert [request.body for request in expected] == [b"body", b"", b"abc"]
    assert b"trailer" not in expected[2].headers
    assert list(read(*(whole[at : at + 1] for at in range(len(whole)))).requests) == expected
    for cut in range(len(whole)):
        assert list(read(whole[:cut], whole[cut:]).requests) == expected


def test_the_same_bytes_again_are_the_same_request() -> None:
    asked: list[Request] = []
    one = RequestReader(RULES, lambda request: asked.append(request), refusal, "peer", Heads())
    got: list[Request] = []
    for piece in (POST, POST, GET, POST[:50], POST[50:], POST, POST + GET, POST, b"", POST):
        one.feed(piece)
        got += one.requests
        one.requests.clear()
    bodies = [b"body", b"body", b"", b"body", b"body", b"body", b"", b"body", b"body"]
    assert [request.body for request in got] == bodies
    assert got[1] == got[0]
    assert one.refused is None
    one.feed(POST[:50])
    one.feed(POST)
    assert [request.body for request in one.requests] != [b"body", b"body"], "the rest of a request is no request"


def test_a_request_that_ends_its_connection_is_not_remembered() -> None:
    last = GET.replace(b"Host", b"Connection: close\r\nHost")
    one = read(last, last)
    assert len(one.requests) == 1
    assert refused(one) == 400


def test_what_is_remembered_is_what_came_in_one_piece_alone() -> None:
    one = read(POST, b"\r\n", b"\r\n")
    assert [request.body for request in one.requests] == [b"body"]


def test_it_says_what_is_missing() -> None:
    one = read(POST[:10])
    assert (one.in_head, one.in_body) == (True, False)
    one.feed(POST[10:-1])
    assert (one.in_head, one.in_body) == (False, True)
    one.feed(POST[-1:])
    assert (one.in_head, one.in_body, len(one.requests)) == (False, False, 1)


@pytest.mark.parametrize(
    ("given", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x00", 400),
        (b"cos\nsystem\n(S'touch /tmp/x'\ntR.", 400),
        (b"GET / HTTP/1.1\nHost: h\n\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (b"GET /a b HTTP/1.1\r\n\r\n", 400),
        (b"GET http://127.0.0.1/ HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b"CONNECT h:80 HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nA: b\x00c\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nA : b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nA: b\r\n c\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nbody", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n", 400),
        (CHUNKED + b"-1\r\n", 400),
        (CHUNKED + b"ffffffffffffffffff\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (limits.CONTROL_BODY_BYTES_MAX + 1), 413),
        (CHUNKED + (b"1000\r\n" + b"x" * 0x1000 + b"\r\n") * 17, 413),
        (CHUNKED + b"1\r\nx\r\n" * 40_000, 413),
        (CHUNKED + b"0\r\n" + b"A: b\r\n" * 40_000, 413),
        (b"GET /" + b"x" * limits.CONTROL_HEAD_BYTES_MAX + b" HTTP/1.1\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nA: " + b"x" * limits.CONTROL_HEAD_BYTES_MAX + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * (limits.HEADERS_MAX + 1) + b"\r\n", 431),
    ],
)
def test_what_is_refused(given: bytes, status: int) -> None:
    whole, dripped = read(given), read(*(given[at : at + 100] for at in range(0, len(given), 100)))
    assert (refused(whole), refused(dripped)) == (status, status)
    assert not whole.requests
    whole.feed(GET)
    assert not whole.requests, "nothing counts after a refusal"


def test_an_endless_head_is_refused_before_it_ends() -> None:
    one = reader()
    one.feed(b"GET / HTTP/1.1\r\nA: ")
    for _ in range(limits.CONTROL_HEAD_BYTES_MAX // 1000 + 1):
        one.feed(b"x" * 1000)
    assert refused(one) == 431


def test_the_service_refuses_before_the_body() -> None:
    asked: list[Request] = []

    def refuse(request: Request) -> Answer | None:
        asked.append(request)
        return refusal(401, "unauthorized", "no")

    one = RequestReader(RULES, refuse, refusal, "peer", Heads())
    one.feed(POST[:-4])
    assert (refused(one), len(asked)) == (401, 1)
    one.feed(POST[-4:] + POST)
    assert (len(asked), list(one.requests)) == (1, [])


def test_few_requests_may_wait() -> None:
    one = read(GET * (limits.CONTROL_PIPELINE_MAX + 1))
    assert (len(one.requests), refused(one)) == (limits.CONTROL_PIPELINE_MAX, 400)


def test_an_expectation_is_said_once() -> None:
    one = read(POST.replace(b"Host", b"Expect: 100-continue\r\nHost")[:-4])
    assert one.take_expectation()
    assert not one.take_expectation()


@settings(max_examples=300)
@given(st.lists(st.sampled_from([POST, GET, CHUNKED, b"\r\n", b"0\r\n\r\n", b"5\r\n"]) | st.binary(max_size=40)))
def test_no_bytes_raise(pieces: list[bytes]) -> None:
    one = read(*pieces)
    assert len(one.requests) <= limits.CONTROL_PIPELINE_MAX
