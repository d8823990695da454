"""Prefill and decode asked together: every order in which they can answer, fail and be left alone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from tests.unit.mock_instance import JSON, TOKEN, Fleet, MockInstance, Seen, asking, fleet, streaming_pair, until
from vllm_fleet.core import limits
from vllm_fleet.net.sockets import free_port
from vllm_fleet.router.http import ClientSink
from vllm_fleet.router.upstream import UpstreamAnswer
from vllm_fleet.wire.control import Change
from vllm_fleet.wire.ticket import FIELD, StreamTicket, unseal

HANDED_OFF = 'vllm_fleet_router_handoffs_total{outcome="handed_off"}'


def in_flight(up: Fleet, *instances: MockInstance) -> list[float]:
    return [up.metric(f'vllm_fleet_router_in_flight{{instance="{one.name}"}}') for one in instances]


@contextlib.asynccontextmanager
async def both_asked(
    up: Fleet, p: MockInstance, d: MockInstance, **fields: Any
) -> AsyncIterator[asyncio.Task[tuple[int, Any, dict[str, str]]]]:
    """A request that has reached both instances."""
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(up.post({"prompt": "hi", **fields}))
        await until(lambda: p.running == 1 and d.running == 1)
        assert in_flight(up, p, d) == [1, 1]
        yield waiting


def asked(seen: Seen) -> dict[str, Any]:
    """The body without the router's own wish to be told token ids."""
    return {name: value for name, value in seen.body.items() if name != "return_token_ids"}


async def event_stream(up: Fleet) -> aiohttp.ClientResponse:
    """A stream whose response headers are here."""
    sent = json.dumps({"prompt": "hi", "stream": True})
    return await up.http.post(f"{up.router.url}/v1/completions", data=sent, headers=JSON)


# Bodies and headers ------------------------------------------------------------------------------------------------


async def test_both_get_one_ticket_before_either_has_answered() -> None:
    p, d = streaming_pair()
    p.gate = d.gate = asyncio.Event()
    async with fleet(p, d) as up, both_asked(up, p, d, max_tokens=7) as waiting:
        p.gate.set()
        status, body, headers = await waiting
        assert (status, body["choices"][0]["text"]) == (200, "from d")
        assert (headers["x-fleet-prefill"], headers["x-fleet-decode"]) == ("p", "d")
        assert (headers["x-fleet-handoff"], headers["x-fleet-handoff-mode"]) == ("handed_off", "streamed")
        hold, load = p.seen[0].body.pop("kv_transfer_params"), d.seen[0].body.pop("kv_transfer_params")
        assert p.seen[0].body == {"prompt": "hi", "max_tokens": 1, "n": 1, "stream": False, "temperature": 0}
        assert d.seen[0].body == {"prompt": "hi", "max_tokens": 7}
        assert (hold["do_remote_decode"], hold["do_remote_prefill"]) == (True, False)
        assert (load["do_remote_decode"], load["do_remote_prefill"]) == (False, True)
        assert hold[FIELD] == load[FIELD]
        ticket = unseal(hold[FIELD], TOKEN)
        assert isinstance(ticket, StreamTicket)
        assert (ticket.engine, ticket.workers) == ("p-1", p.workers)
        assert p.seen[0].headers["x-request-id"] == f"{d.seen[0].headers['x-request-id']}-p"
        await until(lambda: up.metric(HANDED_OFF) == 1)
        await until(lambda: up.metric("vllm_fleet_router_prefill_seconds_count") == 1)
        await until(lambda: in_flight(up, p, d) == [0, 0])


async def test_each_request_has_a_transfer_of_its_own() -> None:
    p, d = streaming_pair()
    async with fleet(p, d) as up:
        for _ in range(2):
            await up.post({"prompt": "hi"})
        tickets = [unseal(seen.body["kv_transfer_params"][FIELD], TOKEN) for seen in d.seen]
        assert tickets[0].transfer != tickets[1].transfer


@pytest.mark.parametrize("why", ["no workers", "setting"])
async def test_the_sequential_way_stays(why: str) -> None:
    p, d = streaming_pair()
    if why == "no workers":
        p.workers = ()
    async with fleet(p, d, streamed=why != "setting") as up:
        _, _, headers = await up.post({"prompt": "hi"})
        assert (headers["x-fleet-handoff"], headers["x-fleet-handoff-mode"]) == ("handed_off", "sequential")
        assert d.seen[0].body["kv_transfer_params"] == p.params


async def test_no_mode_where_nothing_is_handed_off() -> None:
    p, d = streaming_pair()
    async with fleet(p, d) as up:
        _, _, headers = await up.post({"prompt": "hi", "n": 2})
        assert headers["x-fleet-handoff"] == "skipped:n"
        assert "x-fleet-handoff-mode" not in headers
        assert p.seen == []


async def test_what_prefill_says_of_params_is_ignored() -> None:
    p, d = streaming_pair()
    p.params = None
    async with fleet(p, d) as up:
        _, _, headers = await up.post({"prompt": "hi"})
        assert headers["x-fleet-handoff"] == "handed_off"


async def test_no_ticket_is_ever_logged(caplog: pytest.LogCaptureFixture) -> None:
    p, d = streaming_pair()
    p.fault, d.fault = "drop", "drop"
    with caplog.at_level(logging.DEBUG, "vllm_fleet"):
        async with fleet(p, d) as up:
            await up.post({"prompt": "hi"})
    tickets = [
        seen.body["kv_transfer_params"][FIELD] for seen in (*p.seen, *d.seen) if "kv_transfer_params" in seen.body
    ]
    assert tickets
    assert any("upstream.failed" in record.getMessage() for record in caplog.records)
    assert not any(ticket in record.getMessage() for ticket in tickets for record in caplog.records)


# Both orders of answering ------------------------------------------------------------------------------------------


async def test_prefill_answers_long_before_decode() -> None:
    p, d = streaming_pair()
    d.gate = asyncio.Event()
    async with fleet(p, d) as up, asyncio.TaskGroup() as group:
        waiting = group.create_task(up.post({"prompt": "hi"}))
        await until(lambda: d.running == 1 and len(p.seen) == 1 and p.running == 0)
        await until(lambda: in_flight(up, p, d) == [0, 1])
        d.gate.set()
        status, _, headers = await waiting
        assert (status, headers["x-fleet-handoff"]) == (200, "handed_off")


async def test_decode_is_done_before_prefill_answers() -> None:
    p, d = streaming_pair()
    p.gate = asyncio.Event()
    async with fleet(p, d) as up:
        status, _, headers = await up.post({"prompt": "hi"})
        assert (status, headers["x-fleet-handoff"]) == (200, "handed_off")
        await until(lambda: up.router.exchange.live == 0)
        assert in_flight(up, p, d) == [1, 0]
        p.gate.set()
        await until(lambda: up.metric("vllm_fleet_router_prefill_seconds_count") == 1)
        assert p.cancelled == 0
        await until(lambda: in_flight(up, p, d) == [0, 0])


async def test_a_prefill_that_decode_overtook_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LATE_PREFILL_S", 0.05)
    p, d = streaming_pair()
    p.gate, d.gate = asyncio.Event(), asyncio.Event()
    async with fleet(p, d) as up, both_asked(up, p, d) as waiting:
        d.gate.set()
        await waiting
        await until(lambda: p.cancelled == 1)
        await until(lambda: in_flight(up, p, d) == [0, 0])
        assert asking() == []


async def test_a_router_that_stops_takes_overtaken_prefills_along(caplog: pytest.LogCaptureFixture) -> None:
    p, d = streaming_pair()
    p.fault = "silent"
    with caplog.at_level(logging.WARNING, "vllm_fleet"):
        async with fleet(p, d) as up:
            await up.post({"prompt": "hi"})
            await until(lambda: p.running == 1)
    assert asking() == []
    assert caplog.records == []  # ended by us, not by a connection that broke under it


@pytest.mark.parametrize("status", [400, 500])
async def test_an_answer_that_has_begun_goes_on_whatever_prefill_says(status: int) -> None:
    p, d = streaming_pair()
    p.gate, p.fault, p.status = asyncio.Event(), "status", status
    d.stream_gate = asyncio.Event()
    async with fleet(p, d) as up:
        answer = await event_stream(up)
        assert await answer.content.readuntil(b"\n\n") == d.stream[0]
        p.gate.set()
        await until(lambda: p.running == 0)
        await until(lambda: in_flight(up, p, d) == [0, 1])
        d.stream_gate.set()
        assert await answer.read() == b"".join(d.stream[1:])
        assert answer.headers["x-fleet-handoff"] == "handed_off"
        assert (len(d.seen), d.cancelled) == (1, 0)
        await until(lambda: up.metric(HANDED_OFF) == 1)


# Prefill refuses, or fails -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_by_prefill_is_the_answer_and_cancels_decode(stream: bool) -> None:
    p, d = streaming_pair()
    p.gate, p.fault, p.status = asyncio.Event(), "status", 400
    d.gate = asyncio.Event()
    async with fleet(p, d) as up, both_asked(up, p, d, stream=stream) as waiting:
        p.gate.set()
        status, body, headers = await waiting
        assert (status, body["error"]["message"]) == (400, "mock says no")
        assert headers["x-fleet-handoff"] == "refused"
        assert "x-fleet-handoff-mode" not in headers
        await until(lambda: d.cancelled == 1)
        assert in_flight(up, p, d) == [0, 0]


async def test_decode_is_over_before_a_refusal_by_prefill_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    p, d = streaming_pair()
    p.gate, p.fault, p.status, d.gate = asyncio.Event(), "status", 400, asyncio.Event()
    start, still_asking = ClientSink.start, []

    async def spied(sink: ClientSink, status: int, pairs: Any, length: int | None) -> None:
        still_asking.append(asking())
        await start(sink, status, pairs, length)

    monkeypatch.setattr(ClientSink, "start", spied)
    async with fleet(p, d) as up, both_asked(up, p, d) as waiting:
        p.gate.set()
        assert (await waiting)[0] == 400
    assert still_asking == [[]]


async def test_a_refusal_by_decode_is_the_answer_and_cancels_prefill() -> None:
    p, d = streaming_pair()
    p.gate = asyncio.Event()
    d.gate, d.fault, d.status = asyncio.Event(), "status", 404
    async with fleet(p, d) as up, both_asked(up, p, d) as waiting:
        d.gate.set()
        status, body, headers = await waiting
        assert (status, body["error"]["message"]) == (404, "mock says no")
        assert headers["x-fleet-handoff"] == "refused"
        await until(lambda: p.cancelled == 1)
        await until(lambda: up.metric('vllm_fleet_router_handoffs_total{outcome="refused"}') == 1)
        assert in_flight(up, p, d) == [0, 0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", ["drop", "status", "die_mid_body", "plain_error"])
async def test_a_failing_prefill_leaves_the_prompt_to_the_same_decode(fault: Any, stream: bool) -> None:
    p, d = streaming_pair()
    idle = MockInstance("e", "decode")
    p.gate, p.fault = asyncio.Event(), fault
    gate = d.gate = asyncio.Event()
    async with fleet(p, d, idle) as up, asyncio.TaskGroup() as group:
        body = {"prompt": "hi", "stream": stream}
        waiting = group.create_task(up.stream(body) if stream else up.post(body))
        await until(lambda: p.running == 1 and d.running == 1)
        d.gate = None  # for the next request; the first waits on
        p.gate.set()
        answer: tuple[Any, ...] = await waiting
        headers = answer[-1]
        assert (headers["x-fleet-decode"], headers["x-fleet-handoff"]) == ("d", "prefill_failed")
        assert "x-fleet-handoff-mode" not in headers
        if stream:
            assert answer[0] == b"".join(d.stream)
        await until(lambda: d.cancelled == 1)
        assert not gate.is_set()
        assert [asked(seen) for seen in d.seen[1:]] == [body]
        assert idle.seen == []
        await until(lambda: in_flight(up, p, d) == [0, 0])


async def test_a_prefill_that_is_not_there_costs_no_answer() -> None:
    _, d = streaming_pair()
    url = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    dead = MockInstance("p", "prefill", url=url, workers=streaming_pair()[0].workers)
    d.gate = asyncio.Event()
    async with fleet(d, members=(dead.member(),)) as up, asyncio.TaskGroup() as group:
        waiting = group.create_task(up.post({"prompt": "hi"}))
        await until(lambda: any("kv_transfer_params" not in seen.body for seen in d.seen))
        d.gate.set()
        status, _, headers = await waiting
        assert (status, headers["x-fleet-handoff"]) == (200, "prefill_failed")
        await until(lambda: in_flight(up, d) == [0])


async def test_a_prefill_that_the_controller_gives_up_is_not_waited_for() -> None:
    p, d = streaming_pair()
    p.fault, d.gate = "silent", asyncio.Event()
    async with fleet(p, d) as up, both_asked(up, p, d) as waiting:
        d.gate, p.gate = None, None
        up.router.exchange.apply(Change(2, p.member("gone")))
        status, _, headers = await waiting
        assert (status, headers["x-fleet-handoff"]) == (200, "prefill_failed")
        await until(lambda: p.cancelled == 1 and d.cancelled == 1)
        assert up.metric('vllm_fleet_router_upstream_failures_total{kind="gone",stage="prefill"}') == 1


async def test_when_prefill_and_decode_fail_another_decode_answers() -> None:
    p, d = streaming_pair()
    other = MockInstance("e", "decode")
    p.fault = d.fault = "drop"
    async with fleet(p, d, other) as up:
        status, body, headers = await up.post({"prompt": "hi"})
        assert (status, body["choices"][0]["text"]) == (200, "from e")
        assert headers["x-fleet-handoff"] in ("prefill_failed", "skipped:retried")
        assert "kv_transfer_params" not in other.seen[0].body


async def test_an_unstreamed_answer_that_has_begun_goes_on_without_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    here, go_on, chunks = asyncio.Event(), asyncio.Event(), UpstreamAnswer.chunks

    async def slow_chunks(answer: UpstreamAnswer) -> AsyncIterator[bytes]:
        async for chunk in chunks(answer):
            if b"from d" in chunk:  # decode's response is here, its body is not read to the end
                here.set()
                await go_on.wait()
            yield chunk

    monkeypatch.setattr(UpstreamAnswer, "chunks", slow_chunks)
    p, d = streaming_pair()
    p.gate, p.fault = asyncio.Event(), "status"
    async with fleet(p, d) as up, asyncio.TaskGroup() as group:
        waiting = group.create_task(up.post({"prompt": "hi"}))
        await here.wait()
        p.gate.set()
        await until(lambda: in_flight(up, p, d) == [0, 1])
        go_on.set()
        status, body, headers = await waiting
        assert (status, body["choices"][0]["text"], headers["x-fleet-handoff"]) == (200, "from d", "handed_off")
        assert len(d.seen) == 1


# Decode fails ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "stream"),
    [("drop", False), ("status", False), ("die_mid_body", False), ("status", True), ("die_before_event", True)],
)
async def test_a_decode_that_dies_early_is_replaced_and_prefill_cancelled(fault: Any, stream: bool) -> None:
    p, d = streaming_pair()
    other = MockInstance("e", "decode")
    p.gate, d.fault, d.gate = asyncio.Event(), fault, asyncio.Event()
    async with fleet(p, d, other) as up, asyncio.TaskGroup() as group:
        body = {"prompt": "hi", "stream": stream}
        waiting = group.create_task(up.stream(body) if stream else up.post(body))
        await until(lambda: p.running == 1 and d.running == 1)
        d.gate.set()
        answer: tuple[Any, ...] = await waiting
        headers = answer[-1]
        assert (headers["x-fleet-decode"], headers["x-fleet-handoff"]) == ("e", "skipped:retried")
        assert [asked(seen) for seen in other.seen] == [body]
        await until(lambda: p.cancelled == 1)
        await until(lambda: in_flight(up, p, d, other) == [0, 0, 0])
        assert asking() == []


async def test_a_decode_that_never_connects_leaves_the_ticket_to_another() -> None:
    p, other = streaming_pair()
    p.gate, other.name = asyncio.Event(), "e"
    other.gate = asyncio.Event()
    dead = MockInstance("d", "decode", url=f"http://127.0.0.1:{free_port('127.0.0.1')}")
    async with fleet(p, other, members=(dead.member(),)) as up, both_asked(up, p, other) as waiting:
        assert in_flight(up, dead) == [0]
        other.gate.set()
        _, _, headers = await waiting
        assert (headers["x-fleet-decode"], headers["x-fleet-handoff"]) == ("e", "handed_off")
        assert other.seen[0].body["kv_transfer_params"][FIELD] == p.seen[0].body["kv_transfer_params"][FIELD]
        assert len(p.seen) == 1
        p.gate.set()


async def test_the_last_instance_standing_answers_itself() -> None:
    p, d = streaming_pair()
    d.fault, p.gate, d.gate = "drop", asyncio.Event(), asyncio.Event()
    async with fleet(p, d) as up, both_asked(up, p, d) as waiting:
        d.gate.set()
        await until(lambda: p.cancelled == 1 and len(p.seen) == 2)
        p.gate.set()
        status, body, headers = await waiting
        assert (status, body["choices"][0]["text"]) == (200, "from p")
        assert headers["x-fleet-handoff"] == "skipped:retried"


async def test_a_stream_that_breaks_ends_with_one_error() -> None:
    p, d = streaming_pair()
    d.fault = "die_mid_stream"
    async with fleet(p, d) as up:
        body, headers = await up.stream({"prompt": "hi"})
        assert headers["x-fleet-handoff"] == "handed_off"
        assert json.loads(body.decode().split("\n\n")[-2].removeprefix("data: "))["error"]["code"] == "upstream_died"
        await until(lambda: asking() == [])


# The client's side -------------------------------------------------------------------------------------------------


async def test_the_client_sees_nothing_before_the_first_event() -> None:
    p, d = streaming_pair()
    p.gate, p.fault, p.status, d.gate = asyncio.Event(), "status", 422, asyncio.Event()
    async with fleet(p, d) as up, asyncio.TaskGroup() as group:
        answering = group.create_task(event_stream(up))
        await until(lambda: d.headers_out == 1 and p.running == 1)
        p.gate.set()  # decode's 200 was out already: had it been passed on, this could not be the status
        assert (await answering).status == 422
        await until(lambda: d.cancelled == 1)


async def test_a_client_that_leaves_cancels_both() -> None:
    p, d = streaming_pair()
    p.gate = d.gate = asyncio.Event()
    async with fleet(p, d, request_timeout_s=60) as up:
        waiting = asyncio.create_task(up.post({"prompt": "hi"}))
        await until(lambda: p.running == 1 and d.running == 1)
        waiting.cancel()
        await until(lambda: p.cancelled == 1 and d.cancelled == 1)
        await until(lambda: up.metric('vllm_fleet_router_requests_total{route="/v1/completions",status="499"}') == 1)
        assert up.router.exchange.live == 0
        assert in_flight(up, p, d) == [0, 0]
        assert asking() == []


async def test_a_client_that_leaves_in_the_middle_of_a_stream_cancels_both() -> None:
    p, d = streaming_pair()
    p.gate, d.stream_gate = asyncio.Event(), asyncio.Event()
    async with fleet(p, d, request_timeout_s=60) as up:
        answer = await event_stream(up)
        await answer.content.readuntil(b"\n\n")
        await until(lambda: p.running == 1)
        answer.close()
        await until(lambda: p.cancelled == 1 and d.cancelled == 1)
        await until(lambda: in_flight(up, p, d) == [0, 0])


async def test_the_deadline_ends_both() -> None:
    p, d = streaming_pair()
    p.gate = d.gate = asyncio.Event()
    async with fleet(p, d, request_timeout_s=1.0) as up:
        status, body, _ = await up.post({"prompt": "hi"})
        assert (status, body["error"]["code"]) == (504, "deadline_exceeded")
        await until(lambda: p.cancelled == 1 and d.cancelled == 1)
        assert in_flight(up, p, d) == [0, 0]


async def test_a_router_that_stops_ends_both() -> None:
    p, d = streaming_pair()
    p.gate = d.gate = asyncio.Event()
    async with fleet(p, d) as up, both_asked(up, p, d) as waiting:
        up.router.exchange.stop(0.0)
        status, body, _ = await waiting
        assert (status, body["error"]["code"]) == (503, "router_stopping")
        await until(lambda: p.cancelled == 1 and d.cancelled == 1)
