"""The fleet's counters are the instances' counters added up; silent instances are counted, not waited for."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from vllm_fleet.controller.metrics import fleet_metrics, summed
from vllm_fleet.wire.control import Member

PAGE = """# HELP vllm:fleet_handoffs_total Handoffs
# TYPE vllm:fleet_handoffs_total counter
vllm:fleet_handoffs_total{engine="0",model_name="m",outcome="loaded"} 3.0
vllm:fleet_handoffs_total{engine="1",model_name="m",outcome="loaded"} 2.0
vllm:fleet_handoffs_total{engine="0",model_name="m",outcome="held"} 1.0
vllm:fleet_handoffs_created{engine="0",outcome="held"} 1.7e9
# TYPE vllm:fleet_handoff_copy_seconds histogram
vllm:fleet_handoff_copy_seconds_bucket{engine="0",le="0.1",transport="cma"} 4.0
vllm:fleet_handoff_copy_seconds_sum{engine="0",transport="cma"} 0.25
# TYPE vllm:fleet_recompute_below_tokens gauge
vllm:fleet_recompute_below_tokens{engine="0",peer="127.0.0.1:1"} 50.0
# TYPE vllm:fleet_pins_expired_total counter
vllm:fleet_pins_expired_total 2.0
vllm:num_requests_running{engine="0"} 7.0
"""


def test_pages_are_added_up() -> None:
    assert summed([PAGE, PAGE]).splitlines() == [
        "# HELP vllm:fleet_handoffs_total Handoffs",
        "# TYPE vllm:fleet_handoffs_total counter",
        'vllm:fleet_handoffs_total{outcome="loaded"} 10.0',
        'vllm:fleet_handoffs_total{outcome="held"} 2.0',
        "# TYPE vllm:fleet_handoff_copy_seconds histogram",
        'vllm:fleet_handoff_copy_seconds_bucket{le="0.1",transport="cma"} 8.0',
        'vllm:fleet_handoff_copy_seconds_sum{transport="cma"} 0.5',
        "# TYPE vllm:fleet_pins_expired_total counter",
        "vllm:fleet_pins_expired_total 4.0",
    ]


@pytest.mark.parametrize("page", ["", "vllm:fleet_pins{ 1", "vllm:fleet_pins x", 'vllm:fleet_pins{a="} 1'])
def test_what_is_no_sample_is_left_out(page: str) -> None:
    assert summed([page]) == ""


def member(name: str, url: str) -> Member:
    return Member(name, "decode", url, 1, name, 1, "ready")


@pytest.fixture
async def instance() -> AsyncIterator[str]:
    async def metrics(request: web.Request) -> web.Response:
        return web.Response(text=PAGE)

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def test_instances_are_asked_and_silent_ones_counted(instance: str) -> None:
    page = await fleet_metrics([member("a", instance), member("b", instance), member("c", "http://127.0.0.1:1")])
    assert 'vllm:fleet_handoffs_total{outcome="loaded"} 10.0' in page
    assert "vllm_fleet_instances_asked 3\n" in page
    assert "vllm_fleet_instances_silent 1\n" in page
