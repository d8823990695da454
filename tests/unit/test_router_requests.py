"""A whole router in this process: what one request meets, from handoff to every way it can fail."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest

from tests.unit.mock_instance import JSON, MockInstance, fleet, pair, until
from vllm_fleet.core import limits
from vllm_fleet.net.sockets import free_port
from vllm_fleet.wire.control import Change

# The handoff -------------------------------------------------------------------------------------------------------


async def test_a_handoff_with_the_right_bodies() -> None:
    p, d = pair()
    async with fleet(p, d) as up:
        status, body, headers = await up.post(
            {"prompt": "hi", "max_tokens": 7, "min_tokens": 2}, **{"x-request-id": "req-1", "authorization": "Bearer k"}
        )
        assert status == 200
        assert body["choices"][0]["text"] == "from d"
        assert headers["x-request-id"] == "req-1"
        assert (headers["x-fleet-prefill"], headers["x-fleet-decode"]) == ("p", "d")
        assert headers["x-fleet-handoff"] == "handed_off"
        assert headers["x-kept"] == "1"
        assert "x-private" not in headers
        hold = {"do_remote_decode": True, "do_remote_prefill": False}
        assert p.seen[0].body == {
            "prompt": "hi",
            "max_tokens": 1,
            "n": 1,
            "stream": False,
            "temperature": 0,
            "kv_transfer_params": hold,
        }
        assert d.seen[0].body == {"prompt": "hi", "max_tokens": 7, "min_tokens": 2, "kv_transfer_params": p.params}
        inner = d.seen[0].headers["x-request-id"]  # vLLM cancels all requests of an id with one of them
        assert "req-1" not in inner
        assert p.seen[0].headers["x-request-id"] == f"{inner}-p"
        assert d.seen[0].headers["authorization"] == "Bearer k"
        assert up.metric('vllm_fleet_router_handoffs_total{outcome="handed_off"}') == 1
        assert up.metric('vllm_fleet_router_requests_total{route="/v1/completions",status="200"}') == 1
        assert up.metric("vllm_fleet_router_prefill_seconds_count") == 1
        assert up.metric('vllm_fleet_router_in_flight{instance="d"}') == 0


async def test_a_chat_is_handed_off_too() -> None:
    p, d = pair()
    async with fleet(p, d) as up:
        await up.post({"messages": [{"role": "user", "content": "hi"}]}, "/v1/chat/completions")
        assert p.seen[0].path == "/v1/chat/completions"
        assert p.seen[0].body["max_completion_tokens"] == 1
        assert d.seen[0].body["kv_transfer_params"] == p.params


async def test_a_stream_passes_byte_for_byte() -> None:
    p, d = pair()
    d.stream = (b"data: {\xc3\xa9}\n\n", b": keep-alive\n\n", b"data: 2\n\ndata: 3", b"\n\ndata: [DONE]\n\n")
    async with fleet(p, d) as up:
        body, headers = await up.stream({"prompt": "hi"})
        assert body == b"".join(d.stream)
        assert headers["content-type"] == "text/event-stream; charset=utf-8"
        assert headers["x-fleet-handoff"] == "handed_off"
        assert p.seen[0].body["stream"] is False


async def test_events_come_as_they_are_made() -> None:
    p, d = pair()
    d.fault = "slow"
    async with fleet(p, d) as up:
        sent = json.dumps({"prompt": "hi", "stream": True})
        async with up.http.post(f"{up.router.url}/v1/completions", data=sent, headers=JSON) as answer:
            assert await asyncio.wait_for(answer.content.readuntil(b"\n\n"), 2) == d.stream[0]
        await until(lambda: d.running == 0)


async def test_what_cannot_be_handed_off_goes_to_decode() -> None:
    p, d = pair()
    async with fleet(p, d) as up:
        _, _, headers = await up.post({"prompt": "hi", "n": 2})
        assert headers["x-fleet-handoff"] == "skipped:n"
        assert "x-fleet-prefill" not in headers
        assert p.seen == []
        assert d.seen[0].body == {"prompt": "hi", "n": 2}


async def test_without_prefill_instances_everything_is_local() -> None:
    b = MockInstance("b", "both")
    async with fleet(b) as up:
        _, _, headers = await up.post({"prompt": "hi"})
        assert headers["x-fleet-handoff"] == "local"
        assert b.seen[0].body == {"prompt": "hi"}


async def test_a_client_cannot_steer() -> None:
    p, d = pair()
    evil = {"do_remote_prefill": True, "remote_host": "10.0.0.1"}
    async with fleet(p, d) as up:
        await up.post({"prompt": "hi", "n": 2, "kv_transfer_params": evil, "vllm_xargs": {"kv_transfer_params": "x"}})
        assert d.seen[0].body == {"prompt": "hi", "n": 2, "vllm_xargs": {}}
        assert up.metric("vllm_fleet_router_steering_fields_dropped_total") == 1


# Instances that fail -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["drop", "status", "die_mid_body", "plain_error"])
async def test_a_failing_prefill_costs_no_answer(fault: Any) -> None:
    p, d = pair()
    p.fault = fault
    async with fleet(p, d) as up:
        status, body, headers = await up.post({"prompt": "hi"})
        assert (status, body["choices"][0]["text"]) == (200, "from d")
        assert headers["x-fleet-handoff"] == "prefill_failed"
        assert d.seen[0].body == {"prompt": "hi"}


async def test_a_prefill_that_is_not_there_is_left_alone_for_a_while() -> None:
    _, d = pair()
    dead = MockInstance("p", "prefill", url=f"http://127.0.0.1:{free_port('127.0.0.1')}")
    async with fleet(d, members=(dead.member(),)) as up:
        handoffs = [(await up.post({"prompt": "hi"}))[2]["x-fleet-handoff"] for _ in range(2)]
        assert handoffs == ["prefill_failed", "skipped:no_prefill"]
        assert up.metric('vllm_fleet_router_upstream_failures_total{kind="refused",stage="prefill"}') == 1


async def test_a_prefill_that_the_controller_gives_up_is_not_waited_for() -> None:
    p, d = pair()
    p.fault = "silent"
    async with fleet(p, d) as up, asyncio.TaskGroup() as group:
        waiting = group.create_task(up.post({"prompt": "hi"}))
        await until(lambda: p.running == 1)
        up.router.exchange.apply(Change(2, p.member("gone")))
        status, _, headers = await waiting
        assert (status, headers["x-fleet-handoff"]) == (200, "prefill_failed")
        await until(lambda: p.running == 0)


async def test_a_refusal_by_prefill_is_passed_on() -> None:
    p, d = pair()
    p.fault, p.status = "status", 400
    async with fleet(p, d) as up:
        status, body, headers = await up.post({"prompt": "hi"})
        assert (status, body["error"]["message"]) == (400, "mock says no")
        assert headers["x-fleet-handoff"] == "refused"
        assert d.seen == []


async def test_missing_params_are_counted_and_said(caplog: pytest.LogCaptureFixture) -> None:
    p, d = pair()
    p.params = None
    async with fleet(p, d) as up:
        with caplog.at_level(logging.WARNING, "vllm_fleet"):
            for _ in range(3):
                _, _, headers = await up.post({"prompt": "hi"})
        assert headers["x-fleet-handoff"] == "skipped:no_params"
        assert up.metric('vllm_fleet_router_handoffs_total{outcome="skipped:no_params"}') == 3
        assert sum("handoff.no_params" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("fault", ["drop", "die_mid_body", "status"])
async def test_a_decode_that_dies_early_is_replaced(fault: Any) -> None:
    p, d = pair()
    other = MockInstance("e", "decode")
    d.fault = fault
    async with fleet(p, d, other) as up:
        status, body, headers = await up.post({"prompt": "hi"})
        assert (status, body["choices"][0]["text"]) == (200, "from e")
        assert (headers["x-fleet-decode"], headers["x-fleet-handoff"]) == ("e", "skipped:retried")
        assert "kv_transfer_params" not in other.seen[0].body


async def test_a_decode_that_never_connects_leaves_the_ticket_to_another() -> None:
    p = MockInstance("p", "prefill")
    other = MockInstance("e", "decode")
    dead = MockInstance("d", "decode", url=f"http://127.0.0.1:{free_port('127.0.0.1')}")
    async with fleet(p, other, members=(dead.member(),)) as up:
        _, _, headers = await up.post({"prompt": "hi"})
        assert (headers["x-fleet-decode"], headers["x-fleet-handoff"]) == ("e", "handed_off")
        assert other.seen[0].body["kv_transfer_params"] == p.params


async def test_the_last_instance_standing_answers() -> None:
    p, d = pair()
    d.fault = "drop"
    async with fleet(p, d) as up:
        status, body, _ = await up.post({"prompt": "hi"})
        assert (status, body["choices"][0]["text"]) == (200, "from p")


async def test_when_all_die_the_client_is_told() -> None:
    d = MockInstance("d", "decode", fault="drop")
    async with fleet(d) as up:
        status, body, headers = await up.post({"prompt": "hi"})
        assert (status, body["error"]["code"], headers["x-fleet-decode"]) == (502, "upstream_died", "d")
        assert len(d.seen) == limits.DECODE_ATTEMPTS_MAX


@pytest.mark.parametrize("fault", ["die_mid_stream", "no_done"])
async def test_a_broken_stream_ends_with_one_error(fault: Any) -> None:
    p, d = pair()
    d.fault = fault
    async with fleet(p, d) as up:
        body, _ = await up.stream({"prompt": "hi"})
        events = body.decode().split("\n\n")
        assert events.pop() == ""
        assert events[0] == 'data: {"n":1}'
        assert [json.loads(event.removeprefix("data: ")).keys() for event in events].count({"error": 0}.keys()) == 1
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "upstream_died"
        assert "[DONE]" not in body.decode()


async def test_an_instances_plain_error_is_wrapped() -> None:
    d = MockInstance("d", "decode", fault="plain_error")
    async with fleet(d) as up:
        status, body, headers = await up.post({"prompt": "hi"})
        assert (status, body["error"]["code"]) == (500, "instance_error")
        assert headers["content-type"] == "application/json"


# Clients that leave, and time that runs out ------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "fault"), [("p", "silent"), ("d", "silent"), ("d", "slow")])
async def test_a_client_that_leaves_cancels_the_work(stage: str, fault: Any) -> None:
    p, d = pair()
    busy = p if stage == "p" else d
    busy.fault = fault
    async with fleet(p, d, request_timeout_s=60) as up:
        waiting = asyncio.create_task(up.stream({"prompt": "hi"}))
        await until(lambda: busy.running == 1)
        waiting.cancel()
        await until(lambda: busy.cancelled == 1)
        await until(lambda: up.metric('vllm_fleet_router_requests_total{route="/v1/completions",status="499"}') == 1)
        assert up.router.exchange.live == 0
        assert up.metric(f'vllm_fleet_router_in_flight{{instance="{stage}"}}') == 0


@pytest.mark.parametrize("stage", ["p", "d"])
async def test_the_deadline_ends_a_request(stage: str) -> None:
    p, d = pair()
    busy = p if stage == "p" else d
    busy.fault = "silent"
    # Long enough to reach them on a machine that stalls: ended before, the request would cancel nothing there.
    async with fleet(p, d, request_timeout_s=1.0) as up:
        status, body, _ = await up.post({"prompt": "hi"})
        assert (status, body["error"]["code"]) == (504, "deadline_exceeded")
        assert "router.request_timeout_s" in body["error"]["message"]
        await until(lambda: busy.cancelled == 1)


async def test_the_deadline_ends_a_stream_with_one_error() -> None:
    p, d = pair()
    d.fault = "slow"
    async with fleet(p, d, request_timeout_s=0.5) as up:
        body, _ = await up.stream({"prompt": "hi"})
        assert body.startswith(d.stream[0])
        assert (
            json.loads(body.removeprefix(d.stream[0]).removeprefix(b"data: "))["error"]["code"] == "deadline_exceeded"
        )


async def test_a_router_that_stops_says_so() -> None:
    p, d = pair()
    d.fault = "slow"
    async with fleet(p, d) as up:
        sent = json.dumps({"prompt": "hi", "stream": True})
        async with up.http.post(f"{up.router.url}/v1/completions", data=sent, headers=JSON) as answer:
            await answer.content.readuntil(b"\n\n")
            up.router.exchange.stop(0.2)
            rest = await answer.read()
        assert json.loads(rest.removeprefix(b"data: "))["error"]["code"] == "router_stopping"
        status, body, headers = await up.post({"prompt": "hi"})
        assert (status, body["error"]["code"]) == (503, "router_stopping")
        assert (headers["retry-after"], headers["connection"]) == ("1", "close")
        async with up.http.get(f"{up.router.url}/health") as answer:
            assert (answer.status, (await answer.json())["status"]) == (503, "stopping")
