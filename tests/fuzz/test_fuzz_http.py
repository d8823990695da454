"""Damaged requests and answers at everything of net/http that reads them: typed outcomes, whatever the cut of the bytes
and whatever was remembered before.
"""

from __future__ import annotations

import random

from tests.fuzz.targets import mutate
from vllm_fleet.net.http.answers import AnswerHeads, AnswerReader
from vllm_fleet.net.http.messages import Answer, NotHttp
from vllm_fleet.net.http.reader import Heads, RequestReader
from vllm_fleet.router.rules import router_rules

ROUNDS = 6000
BODY = b'{"model":"m","prompt":"hi","max_tokens":1}'


def explain(status: int, code: str, text: str) -> Answer:
    return Answer(status, text.encode())


def requests() -> list[bytes]:
    """Valid requests of every framing."""
    head = b"POST /v1/completions?a=%%62 HTTP/1.1\r\nHost: h:80\r\nContent-Type: application/json\r\n%b\r\n"
    chunks = b"%x;x=y\r\n%b\r\n5\r\n     \r\n0\r\nT: t\r\n\r\n" % (len(BODY), BODY)
    long, chunked = b"Content-Length: %d\r\n" % len(BODY), b"Transfer-Encoding: chunked\r\n"
    return [
        head % long + BODY,
        head % chunked + chunks,
        head % (b"Expect: 100-continue\r\n" + long) + BODY,
        head % (b"Connection: close\r\n" + chunked) + chunks,
        b"GET /health HTTP/1.1\r\nHost: h\r\n\r\n" * 2,
        b"GET http://h/health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
        head % long + BODY + head % chunked + chunks + b"GET / HTTP/1.1\r\nHost: h\r\n\r\n",
    ]


def answers() -> list[bytes]:
    """Valid answers of every framing."""
    event = b'data: {"choices":[{"text":"a"}]}\n\n'
    chunk = b"%x\r\n%b\r\n" % (len(event), event)
    return [
        b"HTTP/1.1 200 OK\r\ndate: now\r\ncontent-length: %d\r\n\r\n%b" % (len(BODY), BODY),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk * 3 + b"0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + event,
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
    ]


def pieces(data: bytes, rng: random.Random) -> list[bytes]:
    size = rng.choice((1, 7, 50, len(data) or 1))
    return [data[at : at + size] for at in range(0, len(data), size)]


def test_damaged_requests_are_read_the_same_in_every_cut() -> None:
    rng, samples, heads = random.Random(7), requests(), Heads()
    seen: dict[int, int] = {}
    for number in range(ROUNDS):
        damaged = samples[number] if number < len(samples) else mutate(rng, samples)
        outcomes = []
        for cut, remembered in (((damaged,), heads), (pieces(damaged, rng), heads), (pieces(damaged, rng), Heads())):
            reader = RequestReader(router_rules(), lambda _: None, explain, "peer", remembered)
            for piece in cut:
                reader.feed(piece)
            told = [(one.method, one.path, one.query_text, one.body, one.text()) for one in reader.requests]
            outcomes.append((told, reader.refused is None, reader.in_head, reader.in_body))
            status = 200 if reader.refused is None else reader.refused.status
            seen[status] = seen.get(status, 0) + 1
        assert outcomes[0] == outcomes[1] == outcomes[2], (damaged[-120:], outcomes)
    assert set(seen) >= {200, 400, 501, 505}, seen


def test_damaged_answers_are_read_the_same_in_every_cut() -> None:
    rng, samples, heads = random.Random(8), answers(), AnswerHeads()
    refused = 0
    for number in range(ROUNDS):
        damaged = samples[number] if number < len(samples) else mutate(rng, samples)
        outcomes: list[tuple[int | None, bytes, bool, bool] | None] = []
        for cut in ((damaged,), pieces(damaged, rng)):
            reader = AnswerReader(heads)
            try:
                for piece in cut:
                    reader.feed(piece)
            except NotHttp:
                refused += 1
                outcomes.append(None)
                continue
            status = None if reader.head is None else reader.head.status
            outcomes.append((status, b"".join(reader.parts), reader.complete, reader.extra))
        assert outcomes[0] == outcomes[1], damaged
    assert refused > ROUNDS / 10
