"""A whole router in this process: streams that instances break off, and that the client never notices."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest

from tests.sim.router_model import Stream, hear
from tests.unit.mock_instance import Fleet, MockInstance, asking, fleet, streaming_pair, until
from vllm_fleet.core import limits
from vllm_fleet.router.request_rules import RequestRules, Resume
from vllm_fleet.wire.control import Change

BODY: dict[str, Any] = {"prompt": "hello", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
ID = {"x-request-id": "r1"}


def writing(name: str, **how: Any) -> MockInstance:
    return MockInstance(name, "decode", writes=True, **how)


def undisturbed(body: dict[str, Any], path: str = "/v1/completions", asked: MockInstance | None = None) -> bytes:
    """What one instance would have sent, under the id by which ``asked`` was asked."""
    id_ = "r1" if asked is None else asked.seen[0].headers["x-request-id"]
    return b"".join(Stream(path, {**body, "stream": True}, id_, random.Random(0)).events())


async def stream(up: Fleet, body: dict[str, Any], path: str = "/v1/completions") -> bytes:
    sent = json.dumps({**body, "stream": True})
    headers = {"content-type": "application/json", **ID}
    async with up.http.post(f"{up.router.url}{path}", data=sent, headers=headers) as answer:
        return await answer.read()


@pytest.mark.parametrize("cut", [1, 2, 7, 11])
@pytest.mark.parametrize("chat", [False, True])
async def test_a_stream_that_is_cut_goes_on_elsewhere(cut: int, chat: bool) -> None:
    d, e = writing("d", dies_after=cut), writing("e")
    body = {**BODY, "stream_options": {"include_usage": True}}
    path = "/v1/completions"
    if chat:
        body["messages"], path = [{"role": "user", "content": body.pop("prompt")}], "/v1/chat/completions"
    async with fleet(d, e) as up:
        got = await stream(up, body, path)
        assert hear(got).error is None
        assert got == undisturbed(body, path, d), "byte for byte"
        assert (len(d.seen), len(e.seen)) == (1, 1)
        assert up.metric("vllm_fleet_router_resumes_total") == 1
        assert (up.router.exchange.live, up.router.exchange.running) == (0, 0)
        if cut > 1:
            assert e.seen[0].path == "/v1/completions"
            assert e.seen[0].body["max_tokens"] < 12
        await until(lambda: up.metric('vllm_fleet_router_in_flight{instance="e"}') == 0)
        assert asking() == []


async def test_a_handed_off_stream_is_resumed_through_prefill_again() -> None:
    p, d = streaming_pair()
    e = writing("e")
    d.writes, d.dies_after = True, 4
    async with fleet(p, d, e) as up:
        got = await stream(up, BODY)
        assert hear(got).text == hear(undisturbed(BODY)).text
        assert [len(one.seen) for one in (p, d, e)] == [2, 1, 1]
        assert p.seen[1].body["prompt"] == e.seen[0].body["prompt"]
        assert "kv_transfer_params" in e.seen[0].body


async def test_a_stream_that_stalls_goes_on_elsewhere_and_its_work_is_cancelled() -> None:
    d, e = writing("d", stalls_after=3), writing("e")
    async with fleet(d, e, rules=RequestRules(stall_s=0.2)) as up:
        assert hear(await stream(up, BODY)).text == hear(undisturbed(BODY)).text
        await until(lambda: d.cancelled == 1 and d.running == 0)
        assert up.metric('vllm_fleet_router_upstream_failures_total{kind="stalled",stage="decode"}') == 1


async def test_a_stream_that_stalls_is_waited_for_where_nobody_else_is() -> None:
    d = writing("d", stalls_after=3)
    async with fleet(d, rules=RequestRules(stall_s=0.1), request_timeout_s=0.6) as up:
        assert hear(await stream(up, BODY)).error == "deadline_exceeded"
        assert len(d.seen) == 1


async def test_a_stream_without_a_first_byte_is_asked_for_elsewhere() -> None:
    d, e = MockInstance("d", "decode", fault="silent"), writing("e")
    async with fleet(d, e, rules=RequestRules(first_byte_s=0.2)) as up:
        assert hear(await stream(up, BODY)).text == hear(undisturbed(BODY)).text
        await until(lambda: d.cancelled == 1)
        assert up.metric("vllm_fleet_router_resumes_total") == 0
        assert up.metric("vllm_fleet_router_retries_total") == 1


async def test_an_instance_that_the_controller_gives_up_loses_its_streams_to_others() -> None:
    d, e = writing("d", stalls_after=3), writing("e")
    async with fleet(d, e) as up, asyncio.TaskGroup() as group:
        waiting = group.create_task(stream(up, BODY))
        await until(lambda: d.running == 1)
        up.router.exchange.apply(Change(2, d.member("gone")))
        assert hear(await waiting).text == hear(undisturbed(BODY)).text


@pytest.mark.parametrize(
    ("mode", "fields", "error"),
    [
        ("off", {}, "upstream_died"),
        ("exact", {"temperature": 1, "presence_penalty": 1.0}, "upstream_died"),
        ("always", {"temperature": 1, "presence_penalty": 1.0}, None),
        ("always", {"temperature": 1, "structured_outputs": {"regex": "a"}}, "upstream_died"),
    ],
)
async def test_the_setting_decides(mode: Resume, fields: dict[str, Any], error: str | None) -> None:
    d, e = writing("d", dies_after=4), writing("e")
    async with fleet(d, e, rules=RequestRules(resume=mode)) as up:
        heard = hear(await stream(up, {**BODY, **fields}))
        assert (heard.error, heard.done) == (error, 0 if error else 1)
        way = "none" if error else "approximate"
        assert up.metric(f'vllm_fleet_router_resumes_total{{way="{way}"}}') == 1


async def test_without_resume_bodies_and_bytes_are_the_clients() -> None:
    d = writing("d")
    async with fleet(d, rules=RequestRules(resume="off")) as up:
        await stream(up, BODY)
        assert d.seen[0].body == {**BODY, "stream": True}


async def test_a_stream_is_resumed_only_so_often() -> None:
    names = [f"d{number}" for number in range(limits.RESUMES_MAX + 2)]
    instances = [writing(name, dies_after=2) for name in names]
    async with fleet(*instances) as up:
        heard = hear(await stream(up, {**BODY, "max_tokens": 100}))
        assert heard.error == "upstream_died"
        assert sum(len(one.seen) for one in instances) == limits.RESUMES_MAX + 1


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_busy_instance_costs_no_try_and_is_left_alone(streamed: bool) -> None:
    busy = [MockInstance(f"d{at}", "decode", fault="status", status=503, retry_after="5") for at in range(4)]
    last = writing("e")
    async with fleet(*busy, last, rules=RequestRules(attempts_max=1)) as up:
        if streamed:
            assert hear(await stream(up, BODY)).text == hear(undisturbed(BODY)).text
        else:
            assert (await up.post(BODY))[0] == 200
        assert (await up.post(BODY))[0] == 200
        assert sum(len(one.seen) for one in busy) == 4
        assert up.metric("vllm_fleet_router_retries_total") == 0


async def test_when_all_are_busy_the_client_is_told_so() -> None:
    busy = [MockInstance(f"d{at}", "decode", fault="status", status=503, retry_after="5") for at in range(2)]
    async with fleet(*busy) as up:
        status, body, headers = await up.post(BODY)
        assert (status, headers["retry-after"]) == (503, "5")
        assert body["error"]["message"] == "mock says no"


async def test_sick_instances_are_not_hammered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RETRIES_FREE", 0)
    sick = [MockInstance(f"d{at}", "decode", fault="status") for at in range(3)]
    async with fleet(*sick, rules=RequestRules(retry_budget=0.2)) as up:
        for _ in range(10):
            assert (await up.post(BODY))[0] == 500
        assert sum(len(one.seen) for one in sick) <= 12


async def test_a_stream_whose_end_is_all_that_is_missing_is_ended_without_another_instance() -> None:
    d, e = writing("d"), writing("e")
    d.dies_after = 12  # all its tokens are out, with the reason; usage and [DONE] are not
    body = {**BODY, "stream_options": {"include_usage": True}}
    async with fleet(d, e) as up:
        assert await stream(up, body) == undisturbed(body, asked=d)
        assert e.seen == []
        assert up.metric('vllm_fleet_router_resumes_total{way="finish"}') == 1
