"""The table of pins: every pin ends exactly once, whatever happens."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vllm_fleet.connector.pins import PinTable
from vllm_fleet.core import limits


def table() -> PinTable:
    pins = PinTable(hold_s=100.0)
    pins.hold("t", "request", [3, 4], deadline=10.0)
    return pins


def covers(pins: PinTable, *ranges: tuple[int, int]) -> bool:
    first, last = np.array(ranges, np.int64).T
    return pins.covers("t", first, last)


def test_open_read_close() -> None:
    pins = table()
    pin = pins.open("t", "decode", now=1.0)
    assert pin is not None
    assert pin.blocks == (3, 4)
    assert covers(pins, (3, 3))
    assert covers(pins, (3, 4), (4, 4))
    assert not covers(pins, (3, 3), (3, 5))
    assert not covers(pins, (2, 4))
    assert pins.close("t", "decode", now=2.0)
    assert pins.ended == ["request"]


def test_a_transfer_is_single_use() -> None:
    pins = table()
    assert pins.open("t", "decode", now=1.0) is not None
    assert pins.close("t", "decode", now=2.0)
    assert pins.open("t", "decode", now=3.0) is None
    assert not pins.close("t", "decode", now=3.0)
    assert pins.ended == ["request"]


def test_nobody_else_can_open_close_or_read_an_open_transfer() -> None:
    pins = table()
    assert not covers(pins, (3, 3))
    assert pins.open("t", "decode", now=1.0) is not None
    assert pins.open("t", "other", now=1.0) is None
    assert not pins.close("t", "other", now=1.0)
    assert pins.ended == []


def test_a_lease_ends_and_an_open_transfer_gets_longer() -> None:
    pins = table()
    assert pins.expire(9.9) == []
    assert pins.open("t", "decode", now=9.9) is not None
    assert pins.expire(50.0) == []
    assert not pins.close("t", "decode", now=110.0)
    assert pins.ended == ["request"]
    assert pins.expired == 1


def test_a_lost_opener_ends_its_pins_only() -> None:
    pins = table()
    pins.hold("u", "second", [5], deadline=10.0)
    pins.open("t", "decode", now=1.0)
    pins.lost("decode")
    assert pins.ended == ["request"]
    assert list(pins.pins) == ["u"]


def test_a_full_table_gives_blocks_back_at_once() -> None:
    pins = PinTable(hold_s=1.0)
    for index in range(limits.PINS_MAX + 1):
        pins.hold(f"t{index}", f"r{index}", [1], deadline=10.0)
    assert pins.ended == [f"r{limits.PINS_MAX}"]


class Pins(RuleBasedStateMachine):
    """Any order of events: a held request ends once, and never before something ended it."""

    def __init__(self) -> None:
        super().__init__()
        self.pins = PinTable(hold_s=5.0)
        self.now = 0.0
        self.held: list[str] = []

    @rule(lease=st.floats(0, 10))
    def hold(self, lease: float) -> None:
        name = f"r{len(self.held)}"
        self.held.append(name)
        self.pins.hold(name, name, [len(self.held)], self.now + lease)

    @rule(index=st.integers(0, 5), who=st.sampled_from("ab"))
    def open(self, index: int, who: str) -> None:
        self.pins.open(f"r{index}", who, self.now)

    @rule(index=st.integers(0, 5), who=st.sampled_from("ab"))
    def close(self, index: int, who: str) -> None:
        known = f"r{index}" in self.pins.pins
        valid = self.pins.close(f"r{index}", who, self.now)
        assert known or not valid

    @rule(who=st.sampled_from("ab"))
    def lost(self, who: str) -> None:
        self.pins.lost(who)

    @rule(seconds=st.floats(0, 6))
    def later(self, seconds: float) -> None:
        self.now += seconds
        self.pins.expire(self.now)

    @invariant()
    def each_ends_once(self) -> None:
        live = [pin.request for pin in self.pins.pins.values()]
        assert sorted(self.pins.ended + live) == sorted(self.held)


TestPins = Pins.TestCase
