"""A short storm over one prefill and two decode instances; the long one is `make storm`."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.storm import config, table

from tests.conftest import SharedFleets
from vllm_fleet.bench import storm
from vllm_fleet.bench.own_fleet import OwnFleet
from vllm_fleet.bench.storm import Fault, Storm

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

LANES = (
    (Fault("stop", "prefill-0"), Fault("kill", "prefill-0", pause_s=15.0)),  # handoffs to decode-0 go on until then
    (Fault("kill", "decode-1"), Fault("stop", "decode-0")),
)


def test_every_request_ends_right_and_nothing_is_kept(shared_fleets: SharedFleets, tmp_path: Path) -> None:
    shared_fleets.stop()
    fleet = OwnFleet(config(prefill=1, decode=2, deadline_s=60.0), tmp_path)
    fleet.start()
    try:
        report = storm.run(fleet, Storm(requests=150, lanes=LANES, per_s=3.0))
    finally:
        fleet.close()
    print(report)
    assert report.problems == []
    assert report.outcomes["right"] >= 100
    assert report.outcomes["left"] >= 10
    assert report.handoffs["handed_off"] >= 20
    assert [fault["kind"] for fault in report.faults].count("kill") == 2
    assert [fault["kind"] for fault in report.faults].count("stop") == 2
    assert table(report).row_count > 0
