"""The table of pins: every held request ends exactly once, never before it is held, whatever happens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vllm_fleet.connector.pins import PinTable
from vllm_fleet.core import limits

PROMPT, OTHER = b"p" * 32, b"o" * 32
HOLD_S, LEASE_S = 100.0, 10.0


def table() -> PinTable:
    """One held request."""
    pins = PinTable(HOLD_S, LEASE_S)
    pins.hold("t", "request", PROMPT, [3, 4], 8, now=0.0)
    return pins


def growing() -> PinTable:
    """One request under way, with the KV of its first block ready."""
    pins = PinTable(HOLD_S, LEASE_S)
    pins.grow("t", "request", PROMPT, [3, 4])
    pins.publish("t", 4)
    return pins


def covers(pins: PinTable, *ranges: tuple[int, int]) -> bool:
    first, last = np.array(ranges, np.int64).T
    return pins.covers("t", first, last)


def opens(
    pins: PinTable, who: str = "decode", *, now: float = 1.0, prompt: bytes = PROMPT, wait: bool = True, **more: int
) -> bool:
    return pins.open("t", who, now, prompt=prompt, wait=wait, **more) is not None


def test_open_read_close() -> None:
    pins = table()
    pin = pins.open("t", "decode", 1.0, prompt=PROMPT)
    assert pin is not None
    assert (pin.blocks, pin.ready) == ([3, 4], 8)
    assert covers(pins, (3, 3))
    assert covers(pins, (3, 4), (4, 4))
    assert not covers(pins, (3, 3), (3, 5))
    assert not covers(pins, (2, 4))
    assert pins.close("t", "decode", now=2.0)
    assert pins.ended == ["request"]
    assert not covers(pins, (3, 3))


def test_a_transfer_is_single_use() -> None:
    pins = table()
    assert opens(pins)
    assert pins.close("t", "decode", now=2.0)
    assert not opens(pins, now=3.0)
    assert not pins.close("t", "decode", now=3.0, wait=True)
    assert pins.pins == {}, "nobody waits for what has ended"
    assert pins.ended == ["request"]


def test_nobody_else_can_open_close_or_read_an_open_transfer() -> None:
    pins = table()
    assert not covers(pins, (3, 3))
    assert opens(pins)
    assert not opens(pins, "other")
    assert not pins.close("t", "other", now=1.0)
    assert pins.ended == []


def test_another_prompt_is_refused_and_leaves_the_pin_as_it_was() -> None:
    pins = table()
    assert not opens(pins, prompt=OTHER)
    assert not covers(pins, (3, 3))
    assert opens(pins)


# From growing to ended ------------------------------------------------------------------------------------------------


def test_a_growing_pin_is_read_as_it_grows_and_ends_after_it_is_held() -> None:
    pins = growing()
    pin = pins.open("t", "decode", 1.0, prompt=PROMPT)
    assert pin is not None
    assert (pin.blocks, pin.ready) == ([3, 4], 4)
    pins.changed.clear()
    pins.grow("t", "request", PROMPT, [9])
    assert pin.blocks == [3, 4, 9]
    assert pins.changed == set(), "blocks without KV are nothing to tell of"
    pins.publish("t", 10)
    assert pins.changed == {"t"}
    assert covers(pins, (3, 4), (9, 9))
    pins.hold("t", "request", PROMPT, [3, 4, 9], 10, now=5.0)
    assert pins.ended == []
    assert pins.close("t", "decode", now=6.0)
    assert pins.ended == ["request"]


def test_progress_never_goes_back() -> None:
    pins = growing()
    pins.changed.clear()
    pins.publish("t", 4)
    pins.publish("t", 2)
    assert (pins.changed, pins.pins["t"].ready) == (set(), 4)
    pins.publish("unknown", 4)


def test_a_pin_closed_before_its_request_has_finished_ends_when_it_finishes() -> None:
    pins = growing()
    assert opens(pins)
    assert pins.close("t", "decode", now=2.0)
    assert pins.ended == [], "the engine still computes it"
    assert not covers(pins, (3, 3))
    assert not opens(pins, now=3.0)
    assert not pins.close("t", "decode", now=3.0)
    pins.hold("t", "request", PROMPT, [3, 4], 8, now=4.0)
    assert pins.ended == ["request"]
    assert pins.pins == {}


def test_a_growing_pin_has_no_deadline() -> None:
    pins = growing()
    assert opens(pins)
    assert pins.expire(1e9) == []
    pins.hold("t", "request", PROMPT, [3, 4], 8, now=1e9)
    assert pins.expire(1e9 + HOLD_S - 1) == []
    assert pins.expire(1e9 + HOLD_S) == ["t"]
    assert (pins.ended, pins.expired) == (["request"], 1)


def test_a_held_pin_that_nobody_opens_ends_with_its_lease() -> None:
    pins = growing()
    pins.hold("t", "request", PROMPT, [3, 4], 8, now=5.0)
    assert pins.expire(5.0 + LEASE_S - 0.1) == []
    assert pins.expire(5.0 + LEASE_S) == ["t"]
    assert (pins.ended, pins.expired) == (["request"], 1)


def test_a_lease_gets_longer_when_it_is_opened() -> None:
    pins = table()
    assert opens(pins, now=LEASE_S - 0.1)
    assert pins.expire(LEASE_S + 40) == []
    assert not pins.close("t", "decode", now=LEASE_S + HOLD_S)
    assert (pins.ended, pins.expired) == (["request"], 1)


def test_a_revoked_pin_is_told_and_can_be_read_and_closed_no_more() -> None:
    pins = growing()
    assert opens(pins)
    pins.changed.clear()
    pins.revoke("t")
    assert pins.changed == {"t"}
    assert not covers(pins, (3, 3))
    assert not pins.close("t", "decode", now=2.0)
    assert not opens(pins, now=2.0), "it is not expected again"
    assert pins.ended == [], "the engine took its blocks back itself"


def test_a_transfer_revoked_before_it_began_is_not_expected() -> None:
    """Its request was aborted while it waited, and decode comes only now."""
    pins = PinTable(HOLD_S, LEASE_S)
    pins.revoke("t")
    assert not opens(pins)
    assert pins.pins == {}


# A reader comes first -------------------------------------------------------------------------------------------------


def test_a_transfer_is_expected_only_by_who_waits_for_it() -> None:
    pins = PinTable(HOLD_S, LEASE_S)
    assert not opens(pins, wait=False)
    assert pins.pins == {}
    assert opens(pins)
    assert not covers(pins, (0, 0))


def test_an_expected_transfer_begins() -> None:
    pins = PinTable(HOLD_S, LEASE_S)
    assert opens(pins)
    pins.grow("t", "request", PROMPT, [3])
    pins.publish("t", 4)
    assert covers(pins, (3, 3))
    assert pins.expire(1e9) == [], "it is computed, so nothing expires"
    pins.hold("t", "request", PROMPT, [3], 4, now=1e9)
    assert pins.close("t", "decode", now=1e9 + 1)
    assert pins.ended == ["request"]


def test_an_expected_transfer_of_another_prompt_is_refused_and_nothing_of_it_is_readable() -> None:
    pins = PinTable(HOLD_S, LEASE_S)
    assert opens(pins, prompt=OTHER)
    pins.grow("t", "request", PROMPT, [3])
    assert pins.refused == {"t"}
    assert not covers(pins, (3, 3))
    assert not opens(pins, prompt=OTHER)
    assert not pins.close("t", "decode", now=2.0)
    pins.hold("t", "request", PROMPT, [3], 4, now=3.0)
    assert pins.ended == ["request"], "nobody can want it any more"


def test_an_expected_transfer_that_is_held_at_once_for_another_prompt() -> None:
    pins = PinTable(HOLD_S, LEASE_S)
    assert opens(pins, prompt=OTHER)
    pins.hold("t", "request", PROMPT, [3], 4, now=3.0)
    assert pins.refused == {"t"}
    assert not covers(pins, (3, 3))
    assert pins.ended == ["request"]


def test_readers_of_two_prompts_cannot_both_expect_a_transfer() -> None:
    pins = PinTable(HOLD_S, LEASE_S)
    assert opens(pins, "a", readers=2, reader=0)
    assert not opens(pins, "b", readers=2, reader=1, prompt=OTHER)
    assert opens(pins, "b", readers=2, reader=1)


def test_a_transfer_that_never_begins_is_forgotten_and_not_expected_again() -> None:
    pins = PinTable(HOLD_S, LEASE_S)
    assert opens(pins, now=1.0)
    assert pins.expire(HOLD_S + 0.9) == []
    pins.changed.clear()
    assert pins.expire(HOLD_S + 1.0) == ["t"]
    assert pins.changed == {"t"}, "who waits for it is told"
    assert (pins.ended, pins.expired) == ([], 0)
    assert not opens(pins, now=HOLD_S + 2)


def test_giving_up_before_it_begins_ends_it_as_soon_as_it_is_held() -> None:
    pins = PinTable(HOLD_S, LEASE_S)
    assert not pins.close("t", "decode", now=1.0, wait=True)
    assert not opens(pins, now=2.0)
    pins.grow("t", "request", PROMPT, [3])
    pins.publish("t", 4)
    assert pins.ended == []
    pins.hold("t", "request", PROMPT, [3], 4, now=500.0)
    assert pins.ended == ["request"]
    assert pins.pins == {}


def test_a_close_that_does_not_wait_leaves_nothing_behind() -> None:
    pins = PinTable(HOLD_S, LEASE_S)
    assert not pins.close("t", "decode", now=1.0)
    assert pins.pins == {}


def test_closing_what_nobody_has_opened_gives_it_up() -> None:
    pins = table()
    assert pins.close("t", "decode", now=1.0)
    assert pins.ended == ["request"]


# Several readers ------------------------------------------------------------------------------------------------------


def test_the_last_of_two_readers_ends_it() -> None:
    pins = table()
    assert opens(pins, "a", reader=0, readers=2)
    assert opens(pins, "b", reader=1, readers=2)
    assert pins.close("t", "a", now=2.0, reader=0)
    assert pins.ended == []
    assert covers(pins, (3, 4)), "the other one still reads"
    assert not opens(pins, "a", reader=0, readers=2), "each reads once"
    assert not pins.close("t", "a", now=2.0, reader=0)
    assert pins.close("t", "b", now=3.0, reader=1)
    assert pins.ended == ["request"]


def test_it_does_not_end_before_the_second_reader_has_come() -> None:
    pins = table()
    assert opens(pins, "a", reader=0, readers=2)
    assert pins.close("t", "a", now=2.0, reader=0)
    assert pins.ended == []
    assert not covers(pins, (3, 4)), "nobody reads it now"
    assert opens(pins, "b", reader=1, readers=2)
    assert covers(pins, (3, 4))
    assert pins.close("t", "b", now=3.0, reader=1)
    assert pins.ended == ["request"]


@pytest.mark.parametrize(("reader", "readers"), [(1, 1), (2, 2), (1, 3), (-1, 2)])
def test_readers_that_do_not_fit_are_refused(reader: int, readers: int) -> None:
    pins = table()
    assert opens(pins, "a", reader=0, readers=2)
    assert not opens(pins, "b", reader=reader, readers=readers)


def test_a_lost_reader_ends_it_for_all() -> None:
    pins = table()
    assert opens(pins, "a", reader=0, readers=2)
    assert opens(pins, "b", reader=1, readers=2)
    pins.lost("a")
    assert pins.ended == ["request"]
    assert not pins.close("t", "b", now=2.0, reader=1)
    assert not covers(pins, (3, 3))


def test_a_reader_lost_while_it_grows_ends_it_when_it_is_held() -> None:
    pins = growing()
    assert opens(pins, "a", reader=0, readers=2)
    assert opens(pins, "b", reader=1, readers=2)
    pins.lost("a")
    assert not covers(pins, (3, 3))
    assert pins.ended == []
    pins.hold("t", "request", PROMPT, [3, 4], 8, now=3.0)
    assert pins.ended == ["request"]


def test_a_lost_opener_ends_its_pins_only() -> None:
    pins = table()
    pins.hold("u", "second", PROMPT, [5], 4, now=0.0)
    assert opens(pins)
    pins.lost("decode")
    assert pins.ended == ["request"]
    assert list(pins.pins) == ["u"]


# Bounds ---------------------------------------------------------------------------------------------------------------


def test_a_full_table_gives_blocks_back_at_once_and_expects_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PINS_MAX", 3)
    pins = PinTable(HOLD_S, LEASE_S)
    for index in range(4):
        pins.hold(f"t{index}", f"r{index}", PROMPT, [1], 4, now=0.0)
    assert pins.ended == ["r3"]
    assert not opens(pins)
    assert not pins.close("t", "decode", now=1.0, wait=True)
    assert len(pins.pins) == 3


def test_a_request_that_began_in_a_full_table_is_never_shown_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first blocks were not taken down: the later ones must not pass for the first ones."""
    monkeypatch.setattr(limits, "PINS_MAX", 1)
    pins = PinTable(HOLD_S, LEASE_S)
    pins.hold("first", "r", PROMPT, [1], 4, now=0.0)
    pins.grow("t", "request", PROMPT, [3])
    pins.publish("t", 4)
    assert pins.close("first", "decode", now=1.0)  # room again
    pins.grow("t", "request", PROMPT, [4])
    pins.publish("t", 8)
    pin = pins.open("t", "decode", 2.0, prompt=PROMPT, wait=True)
    assert pin is None or pin.blocks in ([], [3, 4])


def test_ended_transfers_are_forgotten_one_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PAST_TRANSFERS_MAX", 2)
    pins = PinTable(HOLD_S, LEASE_S)
    for index in range(5):
        pins.hold(f"t{index}", f"r{index}", PROMPT, [1], 4, now=0.0)
        pins.close(f"t{index}", "decode", now=1.0)
    assert list(pins.past) == ["t3", "t4"]


# Any order of events --------------------------------------------------------------------------------------------------

TRANSFERS = st.integers(0, 4)
WHO = st.sampled_from("abc")


class Pins(RuleBasedStateMachine):
    """A held request ends once, and never before hold(); what is open is of the prompt that its reader wants."""

    def __init__(self) -> None:
        super().__init__()
        self.pins = PinTable(hold_s=5.0, lease_s=3.0)
        self.now = 0.0
        self.state: dict[int, str] = {}
        self.prompts: dict[str, bytes] = {}
        """What the prompt of each transfer is that has begun."""
        self.held: list[str] = []

    @rule(index=TRANSFERS, blocks=st.integers(0, 2))
    def grow(self, index: int, blocks: int) -> None:
        if self.state.setdefault(index, "growing") == "growing":
            self.prompts[f"t{index}"] = PROMPT
            self.pins.grow(f"t{index}", f"r{index}", PROMPT, [index] * blocks)

    @rule(index=TRANSFERS, ready=st.integers(0, 9))
    def publish(self, index: int, ready: int) -> None:
        self.pins.publish(f"t{index}", ready)

    @rule(index=TRANSFERS)
    def hold(self, index: int) -> None:
        if self.state.get(index, "growing") == "growing":
            self.state[index] = "held"
            self.prompts[f"t{index}"] = PROMPT
            self.held.append(f"r{index}")
            self.pins.hold(f"t{index}", f"r{index}", PROMPT, [index], 4, self.now)

    @rule(index=TRANSFERS)
    def revoke(self, index: int) -> None:
        if self.state.get(index) == "growing":
            self.state[index] = "revoked"
            self.pins.revoke(f"t{index}")

    @rule(
        index=TRANSFERS,
        who=WHO,
        reader=st.integers(0, 1),
        readers=st.integers(1, 2),
        wait=st.booleans(),
        prompt=st.sampled_from([PROMPT, PROMPT, OTHER]),
    )
    def open(self, index: int, who: str, reader: int, readers: int, wait: bool, prompt: bytes) -> None:
        name = f"t{index}"
        pin = self.pins.open(name, who, self.now, prompt=prompt, reader=reader, readers=readers, wait=wait)
        if pin is not None:
            assert self.state.get(index) != "revoked"
            assert self.prompts.get(name, prompt) == prompt
            assert self.pins.pins[name].open[reader] == who

    @rule(index=TRANSFERS, who=WHO, reader=st.integers(0, 1), wait=st.booleans())
    def close(self, index: int, who: str, reader: int, wait: bool) -> None:
        known = f"t{index}" in self.pins.pins
        valid = self.pins.close(f"t{index}", who, self.now, reader=reader, wait=wait)
        assert known or not valid
        assert not self.pins.close(f"t{index}", who, self.now, reader=reader), "closed twice"

    @rule(who=WHO)
    def lost(self, who: str) -> None:
        self.pins.lost(who)

    @rule(seconds=st.floats(0, 6))
    def later(self, seconds: float) -> None:
        self.now += seconds
        self.pins.expire(self.now)

    @invariant()
    def each_ends_once(self) -> None:
        live = [pin.request for pin in self.pins.pins.values() if pin.held]
        assert sorted(self.pins.ended + live) == sorted(self.held)

    @invariant()
    def only_who_wants_that_prompt_reads(self) -> None:
        for name, pin in self.pins.pins.items():
            if pin.over or not pin.open:
                index = np.array([int(name[1:])])
                assert not self.pins.covers(name, index, index)
            if pin.known and pin.open:
                assert pin.wanted == pin.prompt

    def teardown(self) -> None:
        self.pins.expire(self.now + 100)
        assert sorted(self.pins.ended) == sorted(self.held), "a held request outlived every lease"
        assert all(self.state[int(name[1:])] == "growing" for name in self.pins.pins)


TestPins = Pins.TestCase
TestPins.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
