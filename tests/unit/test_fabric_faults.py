"""fabric.faults: which transfers a rehearsal makes fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_fleet.config.connector import FabricFaults
from vllm_fleet.config.load import load
from vllm_fleet.core.errors import BadRequest, ConfigError
from vllm_fleet.fabric.faults import Corrupt, Cut, Delay, Refuse, Rule, Script, rehearsal


def drawn(script: Script, what: str, count: int) -> list[list[str]]:
    return [[type(fault).__name__ for fault in script.faults(what, number)] for number in range(count)]


def test_every_so_many_the_kinds_take_turns() -> None:
    script = rehearsal(FabricFaults(every=2, kinds=("cut", "corrupt")))
    assert drawn(script, "transfer", 8) == [[], ["Cut"], [], ["Corrupt"], [], ["Cut"], [], ["Corrupt"]]
    assert drawn(script, "connect", 8) == [[]] * 8


def test_refuse_counts_connections() -> None:
    script = rehearsal(FabricFaults(every=3, kinds=("refuse", "delay"), delay_s=0.5))
    assert drawn(script, "connect", 6) == [[], [], ["Refuse"], [], [], ["Refuse"]]
    assert drawn(script, "transfer", 3) == [[], [], ["Delay"]]
    assert script.faults("transfer", 2) == [Delay(0.5)]


def test_a_rate_is_shared_by_the_kinds_and_the_seed_decides() -> None:
    faults = FabricFaults(rate=0.2, kinds=("cut", "truncate"), seed=7)
    first, again = drawn(rehearsal(faults), "transfer", 4000), drawn(rehearsal(faults), "transfer", 4000)
    assert first == again
    assert 300 < sum("Cut" in found for found in first) < 500
    assert 300 < sum("Truncate" in found for found in first) < 500
    other = FabricFaults(rate=0.2, kinds=("cut", "truncate"), seed=8)
    assert drawn(rehearsal(other), "transfer", 4000) != first


def test_a_rule_with_every_repeats_with_its_probability() -> None:
    script = Script(transfers=(Rule(Cut(1), nth=1, every=3),), connects=(Rule(Refuse("x"), nth=0),))
    assert [number for number in range(9) if script.faults("transfer", number)] == [1, 4, 7]
    assert [number for number in range(9) if script.faults("connect", number)] == [0]
    never = Script(transfers=(Rule(Corrupt(0), nth=0, every=1, probability=0.0),))
    assert not any(never.faults("transfer", number) for number in range(9))
    with pytest.raises(BadRequest, match="every is not negative"):
        Script(transfers=(Rule(Cut(1), every=-1),))


def test_lies_need_checksums_that_find_them(tmp_path: Path) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text("model: m\nfabric: {faults: {every: 5, kinds: [cut, corrupt]}}\n")
    with pytest.raises(ConfigError, match="corrupt claims success, and only fabric"):
        load(file, environ={})
    file.write_text("model: m\nfabric: {checksums: full, faults: {every: 5, kinds: [cut, corrupt]}}\n")
    assert load(file, environ={}).config.fabric.faults.every == 5
