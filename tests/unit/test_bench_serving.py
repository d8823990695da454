"""What benchmarks/gpu_serving.py computes, without a server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from benchmarks.gpu_serving import Report, guarded
from benchmarks.serving_batch import Segment, gaps
from benchmarks.serving_load import Events, RequestFailed, Stream, grown, percentile, read_counters, spread
from benchmarks.serving_mix import Arrival, Asked, arrivals, summary
from benchmarks.serving_phases import Row, interleaved
from benchmarks.serving_table import table


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_counted_however_the_answer_is_cut(size: int) -> None:
    answer = b'data: {"a": 1}\n\ndata: {"b": 2}\n\ndata: [DONE]\n\n'
    events = Events()
    assert sum(events.feed(answer[at : at + size]) for at in range(0, len(answer), size)) == 3
    assert events.end == answer


def test_gaps_are_those_with_both_ends_inside_the_segment() -> None:
    assert gaps([0.0, 1.0, 2.0, 4.0, 5.5], Segment(0, "quiet", 0.5, 5.0)) == [1.0, 2.0]


def test_percentiles() -> None:
    values = [float(each) for each in range(1, 101)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile(values, 1.0)) == (50.0, 99.0, 100.0)
    assert spread([]) == {"n": 0}
    assert spread([0.001, 0.003])["max"] == 3.0


def test_counters_lose_the_labels_that_say_nothing_and_buckets() -> None:
    text = """
# HELP vllm:fleet_handoffs_total x
vllm:fleet_handoffs_total{engine="0",model_name="m",outcome="loaded"} 3.0
vllm:fleet_handoff_wait_seconds_bucket{engine="0",le="1",model_name="m"} 3.0
vllm:fleet_handoff_wait_seconds_sum{engine="0",model_name="m"} 0.5
vllm:num_requests_running{engine="0",model_name="m"} 1.0
"""
    found = read_counters(text)
    assert found == {'vllm:fleet_handoffs_total{outcome="loaded"}': 3.0, "vllm:fleet_handoff_wait_seconds_sum": 0.5}
    assert grown(found, found | {"vllm:fleet_handoff_wait_seconds_sum": 0.75}) == {
        "vllm:fleet_handoff_wait_seconds_sum": 0.25
    }


def test_a_load_is_the_same_each_time_and_arrives_at_its_rate() -> None:
    load = arrivals("long@8", 1)
    assert load == arrivals("long@8", 1)
    assert load != arrivals("mixed@8", 1)
    assert 60 < len(load) < 140
    assert {each.answer_tokens for each in load} == {256, 512, 768, 1024}
    assert len(arrivals("mixed@0.5", 8)) >= 20


def asked(ttft_s: float, tpot_s: float, failed: str | None = None) -> Asked:
    stream = Stream(sent=10.0, at=[10.0 + ttft_s + tpot_s * number for number in range(5)], tokens=5)
    return Asked(Arrival(2.0, 100, 5), stream, failed)


def test_good_requests_keep_both_limits_and_were_answered() -> None:
    found = summary([asked(0.1, 0.005), asked(0.1, 0.015), asked(0.4, 0.005), asked(0.1, 0.005, "cut off")])
    assert (found["asked"], found["answered"]) == (4, 3)
    good = found["good_per_s"]
    assert good["ttft<=200,tpot<=10"] == 0.5  # one of them, in two seconds
    assert good["ttft<=200,tpot<=20"] == good["ttft<=500,tpot<=10"] == 1.0
    assert good["ttft<=500,tpot<=20"] == 1.5
    assert found["between_tokens_ms"]["n"] == 12


async def test_rounds_interleave_and_an_arm_that_keeps_failing_is_left_out() -> None:
    calls: list[tuple[str, int]] = []

    async def good(tokens: int) -> Row:
        calls.append(("good", tokens))
        return {"x": 1.0}

    async def bad(tokens: int) -> Row:
        calls.append(("bad", tokens))
        raise RequestFailed("no")

    found = await interleaved({"good": good, "bad": bad}, (1, 2), 3, until=float("inf"))
    assert [len(found.rows["good", tokens]) for tokens in (1, 2)] == [3, 3]  # the first round is not kept
    assert found.failed == {"good": [], "bad": ["no"] * 3}
    assert calls[:4] == [("bad", 1), ("good", 1), ("good", 2), ("bad", 2)]


async def test_what_a_phase_has_found_survives_its_failure_and_its_time_limit() -> None:
    report = Report(None, {})

    async def fails(into: dict[str, Any]) -> None:
        into["rows"] = [1]
        raise KeyError("x")

    async def hangs(into: dict[str, Any]) -> None:
        into["rows"] = [2]
        await asyncio.Event().wait()

    await guarded(report, "a", fails, 5.0)
    await guarded(report, "d", hangs, 0.01)
    assert report.content["a"]["rows"] == [1]
    assert report.content["a"]["error"] == "KeyError: 'x'"
    assert report.content["d"]["rows"] == [2]
    assert report.content["d"]["error"].startswith("cut off")


def test_the_table_shows_what_failed() -> None:
    report = {
        "not_started": {"nixl-decode": ["why"]},
        "a": {"error": "cut off after 3 s"},
        "b": {
            "rows": [{"tokens": 8192, "rounds": 20, "plain_ms": 300.0, "fleet_ms": 309.0, "ratio": 1.03}],
            "failed": {"router": ["x"]},
        },
    }
    shown = table(report)
    for expected in ("nixl-decode did not start", "cut off after 3 s", "ratio 1.030", "router: 1 failed, first: x"):
        assert expected in shown
