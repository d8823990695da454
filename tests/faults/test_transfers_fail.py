"""Transfers that fail, or claim success and have not moved the right bytes: every answer is right all the same.

`make storm ARGS="--faults-rate 0.05 --faults-every 7 --rounds 0 --requests 10000"` is the long one.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conftest import SharedFleets
from tests.faults.handoffs import asked, broken_fleet, counted, holds_nothing, idle, prompt_of, right
from vllm_fleet.bench.own_fleet import OwnFleet
from vllm_fleet.bench.plain import scrape, total

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

EVERY = 5
FAULTS = {"rate": 0.05, "every": EVERY, "seed": 3, "kinds": ["cut", "truncate", "corrupt", "delay", "reorder"]}
WRONG = 3 / 5
"""Share of these kinds after which the bytes are not what they should be."""


@pytest.fixture(scope="module")
def fleet(shared_fleets: SharedFleets, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnFleet]:
    """Over tcp, whose reads are in several pieces."""
    shared_fleets.stop()
    fabric = {"transports": ["tcp"], "checksums": "full", "faults": FAULTS}
    chunks = ["--max-model-len=4096", "--max-num-batched-tokens=512"]
    with broken_fleet(tmp_path_factory.mktemp("failing"), vllm_args=chunks, fabric=fabric) as running:
        yield running


def test_transfers_that_fail_cost_a_recomputation(fleet: OwnFleet) -> None:
    """240 requests while one in five transfers, and one in twenty of the others, goes wrong."""
    before, decode = idle(fleet), fleet.url("decode-0")
    loaded, recomputed = counted(decode, "loaded"), counted(decode, "recomputed")
    lengths = (80, 300, 700, 1500)
    with ThreadPoolExecutor(8) as pool:
        headers = right(asked(pool, fleet.router, [prompt_of(lengths[at % 4]) for at in range(240)]))
    tried = [found for found in headers if found["x-fleet-handoff"] == "handed_off"]
    assert len(tried) >= 200
    holds_nothing(fleet, before)
    loaded, recomputed = counted(decode, "loaded") - loaded, counted(decode, "recomputed") - recomputed
    assert recomputed >= 0.5 * WRONG / EVERY * (loaded + recomputed), "the faults have happened"
    assert loaded >= 0.3 * (loaded + recomputed), "and not to all"
    failures = total(scrape(decode), "vllm:fleet_handoff_failures_total")
    assert failures >= recomputed
