"""Sixteen streams, an instance killed every ten seconds: no client notices. `python -m benchmarks.kills` is longer."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.kills import config

from tests.conftest import SharedFleets
from vllm_fleet.bench.kills import Kills, Plan
from vllm_fleet.bench.own_fleet import OwnFleet

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]


def test_no_client_notices_that_instances_are_killed(shared_fleets: SharedFleets, tmp_path: Path) -> None:
    shared_fleets.stop()
    fleet = OwnFleet(config(prefill=2, decode=2), tmp_path)
    fleet.start()
    try:
        report = Kills(fleet, Plan(), "fleet-recall").run()
    finally:
        fleet.close()
    print(report)
    assert report.problems == []
    assert report.equal == report.streams >= 32
    assert len(report.kills) == 6
    assert {kill["victim"] for kill in report.kills} == {"prefill-0", "prefill-1", "decode-0", "decode-1"}
