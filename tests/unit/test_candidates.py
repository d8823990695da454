"""Clients that have several controllers: whom they ask, in which order, and what they make of the answers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from tests.unit.test_controller_client import BEARER, answering, following, until
from vllm_fleet.core import limits
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import BadRequest, Busy, NotLeader, PeerGone
from vllm_fleet.net.candidates import Candidates
from vllm_fleet.net.control_client import ControlClient
from vllm_fleet.wire.control import Change, ErrorBody, Snapshot, encode

SNAPSHOT = b'{"type":"snapshot","controller":"j","revision":5,"members":[]}'


def test_the_one_that_answered_is_asked_first_and_the_next_when_it_does_not() -> None:
    candidates = Candidates(["a", "b", "c", "a"])
    assert candidates.order() == ["a", "b", "c"]
    candidates.leads("c")
    assert candidates.order() == ["c", "a", "b"]
    candidates.passed("c")
    assert candidates.order() == ["a", "b", "c"]
    candidates.passed("a", "c")
    assert candidates.order() == ["c", "a", "b"]
    candidates.passed("a")
    assert candidates.order() == ["c", "a", "b"], "an old failure moves nobody"


def test_whoever_is_no_candidate_is_not_believed_in() -> None:
    candidates = Candidates(("a", "b"))
    candidates.passed("a", "http://evil.example")
    assert candidates.order() == ["b", "a"]
    with pytest.raises(BadRequest, match="at least one"):
        Candidates(())


class Played:
    """One controller: what it answers, and how often it was asked."""

    def __init__(self) -> None:
        self.leader: str | None = None
        """None: it leads; else it names this one."""
        self.silent = False
        self.asked = 0
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readuntil(b"\r\n\r\n")
        self.asked += 1
        if self.silent:
            await reader.read(-1)
            return
        status, body = b"200 OK", SNAPSHOT
        if self.leader is not None:
            status, body = b"503 Busy", encode(ErrorBody("not here", "not_leader", self.leader))
        watched = b"/v1/watch" in asked and self.leader is None
        length = b"" if watched else b"Content-Length: %d\r\n" % (len(body) + 1)
        writer.write(b"HTTP/1.1 %b\r\nConnection: close\r\n%b\r\n%b\n" % (status, length, body))
        await writer.drain()
        if watched:
            await reader.read(-1)


@contextlib.asynccontextmanager
async def controllers(count: int) -> AsyncIterator[list[Played]]:
    played = [Played() for _ in range(count)]
    async with contextlib.AsyncExitStack() as stack:
        for one in played:
            one.url = await stack.enter_async_context(answering(one.serve))
        yield played


def client(*played: Played) -> ControlClient:
    return ControlClient([one.url for one in played], BEARER)


async def snapshot(asking: ControlClient, within_s: float = 5.0) -> Snapshot:
    return await asyncio.to_thread(asking.snapshot, Deadline.after(within_s, "test"))


async def test_a_client_goes_where_it_is_sent_and_remembers_it() -> None:
    async with controllers(3) as (first, second, third):
        first.leader = second.leader = third.url
        asking = client(first, second, third)
        for _ in range(2):
            assert (await snapshot(asking)).revision == 5
        assert (first.asked, second.asked, third.asked) == (1, 0, 2)


async def test_a_client_passes_over_dead_and_silent_ones_within_its_deadline() -> None:
    async with controllers(2) as (silent, leader):
        silent.silent = True
        asking = ControlClient(["http://127.0.0.1:1", silent.url, leader.url], BEARER)
        assert (await snapshot(asking, 1.0)).revision == 5
        assert (silent.asked, leader.asked) == (1, 1)
        assert (await snapshot(asking)).revision == 5
        assert silent.asked == 1


async def test_without_a_leader_a_client_says_so_and_sends_its_token_nowhere_else() -> None:
    async with controllers(3) as (first, second, stranger):
        first.leader = second.leader = stranger.url
        with pytest.raises(NotLeader) as refused:
            await snapshot(client(first, second))
        assert isinstance(refused.value, Busy)
        assert refused.value.leader == stranger.url
        assert stranger.asked == 0
    with pytest.raises(PeerGone):
        await snapshot(ControlClient(["http://127.0.0.1:1", "http://127.0.0.1:2"], BEARER))


async def test_a_watcher_finds_the_leader_and_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "WATCH_BACKOFF_S_MIN", 0.01)
    monkeypatch.setattr(limits, "WATCH_BACKOFF_S_MAX", 0.02)
    monkeypatch.setattr(limits, "WATCH_SILENCE_S", 1.0)
    events: list[Snapshot | Change] = []
    async with controllers(3) as (first, second, third):
        first.leader, second.leader = "http://evil.example:1", third.url
        async with following([first.url, second.url, third.url], events):  # type: ignore[arg-type]
            await until(lambda: len(events) >= 1)
            assert (first.asked, second.asked, third.asked) == (1, 1, 1)
            third.silent, first.leader = True, None
            await until(lambda: len(events) >= 2)
        assert first.asked >= 2
