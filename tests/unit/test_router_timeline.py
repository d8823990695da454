"""What the router tells of one request's time, and whom."""

from __future__ import annotations

import asyncio
import json
import re

import pytest

from tests.unit.mock_instance import TOKEN, Fleet, fleet, pair, streaming_pair, until
from vllm_fleet.config.connector import bearer
from vllm_fleet.core import limits
from vllm_fleet.router.timeline import Timelines
from vllm_fleet.wire.ticket import FIELD

RIGHT = f"Bearer {bearer(TOKEN)}"


async def ask(up: Fleet, id_: str, authorization: str | None = RIGHT) -> tuple[int, dict[str, object]]:
    given = {} if authorization is None else {"authorization": authorization}
    async with up.http.get(f"{up.router.url}/fleet/v1/requests/{id_}", headers=given) as answer:
        return answer.status, await answer.json()


# Pure --------------------------------------------------------------------------------------------------------------


def test_stamps_are_relative_to_arrival_and_in_order() -> None:
    line = Timelines().begin("a", "/v1/completions", 100.0)
    line.mark("decode_sent", 100.5)
    line.mark("prefill_sent", 100.25)
    line.mark("decode_sent", 101.0)  # a second attempt
    line.end("handed_off", 200, 103.0)
    assert line.facts()["seconds"] == {"received": 0.0, "prefill_sent": 0.25, "decode_sent": 1.0, "ended": 3.0}
    assert list(line.facts()["seconds"]) == ["received", "prefill_sent", "decode_sent", "ended"]  # type: ignore[call-overload]


def test_server_timing_says_what_is_known() -> None:
    line = Timelines().begin("a", "/v1/completions", 100.0)
    line.mark("prefill_sent", 100.0)
    assert line.server_timing() == ""
    line.mark("decode_sent", 100.001)
    line.mark("first_byte", 100.201)
    assert line.server_timing() == "wait;dur=200.0"
    line.mark("prefill_answered", 100.1)
    assert line.server_timing() == "prefill;dur=100.0, wait;dur=200.0"


def test_only_the_last_requests_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TIMELINES_MAX", 2)
    kept = Timelines()
    for at, name in enumerate(("a", "b", "a", "c")):
        kept.begin(name, "/v1/completions", float(at))
    assert kept.get("b") is None
    again = kept.get("a")
    assert again is not None
    assert again.received == 2.0  # of two requests with one id, the later
    assert kept.get("c") is not None


# Asked of a router -------------------------------------------------------------------------------------------------


async def test_a_streamed_handoff_from_arrival_to_end() -> None:
    p, d = streaming_pair()
    d.gate = asyncio.Event()
    async with fleet(p, d) as up, asyncio.TaskGroup() as group:
        waiting = group.create_task(up.post({"prompt": "secret"}, **{"x-request-id": "req:1"}))
        await until(lambda: d.running == 1 and p.running == 0 and len(p.seen) == 1)
        await until(lambda: up.metric("vllm_fleet_router_prefill_seconds_count") == 1)
        status, said = await ask(up, "req:1")
        assert (status, said["outcome"], said["status"]) == (200, None, None)
        assert (said["prefill"], said["decode"], said["mode"]) == ("p", "d", "streamed")
        d.gate.set()
        await waiting
        await until(lambda: up.router.exchange.live == 0)
        _, said = await ask(up, "req%3A1")
        assert (said["id"], said["route"]) == ("req:1", "/v1/completions")
        assert (said["outcome"], said["status"]) == ("handed_off", 200)
        seconds = said["seconds"]
        assert isinstance(seconds, dict)
        assert seconds.keys() == {
            "received", "prefill_sent", "prefill_answered", "decode_sent", "first_byte", "ended",
        }  # fmt: skip
        assert seconds["decode_sent"] <= seconds["prefill_answered"] <= seconds["first_byte"] <= seconds["ended"]
        text = json.dumps(said)
        assert "secret" not in text
        assert d.seen[0].body["kv_transfer_params"][FIELD] not in text


async def test_a_request_that_nobody_prefilled() -> None:
    p, d = pair()
    async with fleet(p, d) as up:
        await up.post({"prompt": "hi", "n": 2}, **{"x-request-id": "r"})
        await until(lambda: up.router.exchange.live == 0)
        _, said = await ask(up, "r")
        assert (said["prefill"], said["mode"], said["outcome"]) == (None, None, "skipped:n")


async def test_timelines_are_for_those_who_hold_the_secret() -> None:
    p, d = pair()
    async with fleet(p, d) as up:
        await up.post({"prompt": "hi"}, **{"x-request-id": "r"})
        for wrong in (None, "", "Bearer", f"Bearer {TOKEN.hex()}", bearer(TOKEN), RIGHT + "x", "Bearer é"):
            for id_ in ("r", "unknown"):
                status, said = await ask(up, id_, wrong)
                assert (status, said["error"]["code"]) == (401, "not_authorized")  # type: ignore[index]
        assert (await ask(up, "r"))[0] == 200
        status, said = await ask(up, "unknown")
        assert (status, said["error"]["code"]) == (404, "unknown_request")  # type: ignore[index]
        assert (await ask(up, ""))[0] == 404
        assert (await up.get("/fleet/v1/requests/r", "DELETE"))[0] == 405
        assert up.metric('vllm_fleet_router_requests_total{route="/fleet/v1/requests/",status="200"}') == 1


async def test_server_timing_only_for_those_who_ask() -> None:
    p, d = pair()
    async with fleet(p, d) as up:
        _, _, headers = await up.post({"prompt": "hi"})
        assert "server-timing" not in headers
        _, _, headers = await up.post({"prompt": "hi"}, **{"x-fleet-timeline": "1"})
        assert re.fullmatch(r"prefill;dur=\d+\.\d, wait;dur=\d+\.\d", headers["server-timing"])
        assert "x-fleet-timeline" not in d.seen[1].headers


async def test_server_timing_leaves_out_a_prefill_that_has_not_answered() -> None:
    p, d = streaming_pair()
    p.gate = asyncio.Event()
    async with fleet(p, d) as up:
        _, _, headers = await up.post({"prompt": "hi"}, **{"x-fleet-timeline": "1"})
        assert re.fullmatch(r"wait;dur=\d+\.\d", headers["server-timing"])
        p.gate.set()
