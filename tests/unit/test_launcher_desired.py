"""launcher.desired and launcher.orders: how commands change what the fleet is to be, and when it has become so."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import BadRequest, Busy, Fenced, FleetError, PeerGone
from vllm_fleet.launcher import desired, orders
from vllm_fleet.launcher.desired import Slots, counts, restarted, scaled, with_role, without
from vllm_fleet.launcher.processes import boot_id, identify
from vllm_fleet.launcher.record import ChildState, FleetRecord, GpuRecord, Phase, ProcessRecord, write_record
from vllm_fleet.launcher.rundir import RunDir
from vllm_fleet.wire.control import Desired, Member, Slot, Snapshot

P0, D0, D1 = Slot("prefill-0", "prefill"), Slot("decode-0", "decode"), Slot("decode-1", "decode")


def names(slots: Slots) -> list[str]:
    return [slot.name for slot in slots]


# Edits -------------------------------------------------------------------------------------------------------------


def test_scaling_adds_the_first_free_name_and_takes_the_newest() -> None:
    assert scaled((P0, D0), {"prefill": 2, "decode": 3}) == (
        P0, D0, Slot("prefill-1", "prefill"), D1, Slot("decode-2", "decode"),
    )  # fmt: skip
    assert scaled((P0, D0, D1), {"decode": 1}) == (P0, D0)
    assert scaled((P0, D1), {"decode": 2}) == (P0, D1, D0)
    assert scaled((P0, D0), {}) == (P0, D0)


def test_scaling_counts_roles_not_names_and_leaves_names_in_use_alone() -> None:
    turned = (P0, D0, Slot("decode-1", "prefill"))
    assert counts(turned) == {"prefill": 2, "decode": 1, "both": 0}
    assert names(scaled(turned, {"decode": 2})) == ["prefill-0", "decode-0", "decode-1", "decode-2"]
    assert names(scaled((P0, D0), {"decode": 2}, busy={"decode-1"})) == ["prefill-0", "decode-0", "decode-2"]


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: scaled((P0, D0), {"decode": 0}), "1 prefill and no decode instance"),
        (lambda: scaled((P0, D0), {"prefill": 0, "decode": 0}), "without an instance; to end it: vllm-fleet down"),
        (lambda: scaled((P0, D0), {"decode": 300}), "at most 256"),
        (lambda: with_role((P0, D0), "decode-0", "prefill"), "2 prefill and no decode instance"),
        (lambda: without((P0, D0), "decode-0"), "no decode instance"),
        (lambda: without((P0, D0), "decode-7"), "no instance 'decode-7'; it has prefill-0, decode-0"),
        (lambda: restarted((P0, D0), ["x"], rolling=False), "no instance 'x'"),
    ],
)
def test_a_fleet_that_could_not_serve_is_refused(made: Any, said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        made()


def test_a_role_and_a_drain() -> None:
    assert with_role((P0, D0, D1), "decode-1", "both") == (P0, D0, Slot("decode-1", "both"))
    assert without((P0, D0, D1), "decode-0") == (P0, D1)
    assert without((D0, D1, P0), "prefill-0") == (D0, D1), "decode instances compute prompts themselves"


def test_a_rolling_restart_replaces_those_that_nobody_can_stand_in_for() -> None:
    assert restarted((P0, D0, D1), [], rolling=True) == (
        Slot("prefill-1", "prefill", replaces="prefill-0"),
        Slot("decode-0", "decode", 1, True),
        Slot("decode-1", "decode", 1, True),
    )
    assert restarted((P0, D0), ["decode-0"], rolling=True, busy={"decode-1"}) == (
        P0, Slot("decode-2", "decode", replaces="decode-0"),
    )  # fmt: skip
    both = Slot("both-0", "both")
    assert restarted((P0, both), ["prefill-0"], rolling=True) == (Slot("prefill-0", "prefill", 1, True), both)
    assert restarted((P0, D0), ["decode-0"], rolling=True, dead={"decode-0"})[1] == Slot("decode-0", "decode", 1, True)
    assert restarted((P0, D0), [], rolling=False) == (Slot("prefill-0", "prefill", 1), Slot("decode-0", "decode", 1))


def test_gpus_are_counted_before_anything_starts() -> None:
    gpus = GpuRecord(4, 1, {"prefill": 2, "decode": 1, "both": 1})
    desired.check_gpus((P0, D0, D1), gpus)
    desired.check_gpus((P0,) * 9, None)
    with pytest.raises(BadRequest, match=r"^4 instances need 6 GPUs, this machine offers 4$"):
        desired.check_gpus((P0, D0, D1, Slot("prefill-1", "prefill")), gpus)
    with pytest.raises(
        BadRequest, match=r"need 5 GPUs \(prefill-0 can only be replaced where there is room for both\)"
    ):
        desired.check_gpus((Slot("prefill-1", "prefill", replaces="prefill-0"), D0), gpus)


# Progress ----------------------------------------------------------------------------------------------------------


def process(slot: Slot, state: ChildState = "ready", ordered: int = 0, note: str = "") -> ProcessRecord:
    url = f"http://127.0.0.1/{slot.name}"
    return ProcessRecord(slot.name, "instance", slot.role, url, state, 0.0, "/log", ordered=ordered, note=note)


def record(slots: Slots, *processes: ProcessRecord, revision: int = 5, phase: Phase = "serving") -> FleetRecord:
    me = identify(os.getpid())
    assert me is not None
    own = ProcessRecord("controller", "controller", "controller", "http://127.0.0.1:9", "ready", 0.0, "/log", me)
    return FleetRecord("f", "m", boot_id(), me, phase, 8.0, (own, *processes), revision=revision, desired=slots)


def member(slot: Slot, **changes: Any) -> Member:
    return replace(Member(slot.name, slot.role, "http://127.0.0.1:1", 1, "life", 1, "ready"), **changes)


def test_what_is_left_to_do() -> None:
    members = {slot.name: member(slot) for slot in (P0, D0)}
    made = record((P0, D0), process(P0), process(D0))
    everyone = {"prefill-0", "decode-0", "decode-1"}
    assert desired.pending(made, members, 5, everyone) == []
    assert desired.pending(made, members, 6, everyone) == ["the supervisor has not heard of it yet"]
    assert desired.pending(made, {}, 5, everyone)[0] == "prefill-0 is not known to be ready"
    more = record((P0, D0, D1), process(P0), process(D0))
    assert desired.pending(more, members, 5, everyone) == ["decode-1 is not planned yet"]
    starting = record((P0, D0, D1), process(P0), process(D0), process(D1, "starting"))
    assert desired.pending(starting, members, 5, everyone) == ["decode-1 is starting"]
    assert desired.pending(starting, members, 5, {"decode-0"}) == [], "not our business"
    leaving = record((P0, D0), process(P0), process(D0), process(D1, "draining"))
    assert desired.pending(leaving, members, 5, everyone) == ["decode-1 is draining"]
    later = record((P0, Slot("decode-0", "decode", 2)), process(P0), process(D0, ordered=1))
    assert desired.pending(later, members, 5, everyone) == ["decode-0 waits for its restart"]
    turned = record((P0, Slot("decode-0", "both")), process(P0), process(D0))
    assert desired.pending(turned, members, 5, everyone) == ["decode-0 is still 'decode'"]


def test_what_will_not_be_done() -> None:
    dead = process(D1, "given_up", note="died 6 times")
    made = record((P0, D0, D1), process(P0), process(D0), dead)
    assert desired.failures(made, 5, {"decode-1"}) == ["decode-1 died 6 times"]
    assert desired.failures(made, 5, {"decode-0"}) == []
    assert desired.failures(made, 6, {"decode-1"}) == [], "the order is not heard yet"
    ordered = record((P0, D0, Slot("decode-1", "decode", 1)), process(P0), process(D0), dead)
    assert desired.failures(ordered, 5, {"decode-1"}) == [], "it was given up before"


# Orders ------------------------------------------------------------------------------------------------------------


class FakeController:
    """Stands for the client; others may change the fleet in between."""

    def __init__(self, now: Desired, others: int = 0) -> None:
        self.now, self.others, self.asked = now, others, 0

    def desired(self, deadline: Deadline) -> Desired:
        self.asked += 1
        return self.now

    def desire(self, wish: Desired, deadline: Deadline) -> Desired:
        if self.others:
            self.others -= 1
            self.now = Desired(self.now.revision + 1, self.now.instances)
        if wish.revision != self.now.revision:
            raise Fenced("stale")
        self.now = Desired(wish.revision + 1, wish.instances)
        return self.now

    def snapshot(self, deadline: Deadline) -> Snapshot:
        return Snapshot("c", 1, tuple(member(slot) for slot in self.now.instances), self.now)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "f")
    made.acquire()
    made.prepare([])
    write_record(made, record((P0, D0), process(P0), process(D0)))
    return made


def given(run: RunDir, controller: FakeController) -> orders.Orders:
    made = orders.Orders(run)
    made._client = controller  # type: ignore[assignment]
    return made


def test_an_order_is_made_from_what_is_in_force(run: RunDir) -> None:
    controller = FakeController(Desired(3, (P0, D0)), others=2)
    ordered = given(run, controller).change(lambda slots, _: scaled(slots, {"decode": 2}))
    assert ordered == orders.Ordered(6, frozenset({"decode-1"}))
    assert controller.now.instances == (P0, D0, D1)
    assert controller.asked == 3


def test_an_order_gives_up_where_others_never_stop(run: RunDir) -> None:
    with pytest.raises(Busy, match="others changed the fleet 5 times"):
        given(run, FakeController(Desired(3, (P0, D0)), others=99)).change(lambda slots, _: (*slots, D1))


def test_an_order_before_the_fleet_was_described_comes_too_early(run: RunDir) -> None:
    with pytest.raises(Busy, match="does not know yet"):
        given(run, FakeController(Desired())).change(lambda slots, _: slots)


def test_an_order_while_the_controller_is_away_says_so(run: RunDir) -> None:
    with pytest.raises(
        PeerGone, match=r"^the controller of fleet 'f' is away \(.*serves on as it is, try again later$"
    ):
        orders.Orders(run).change(lambda slots, _: slots)


def test_nobody_is_there_to_follow_an_order(run: RunDir) -> None:
    write_record(run, record((P0, D0), phase="stopping"))
    with pytest.raises(Busy, match="is stopping"):
        orders.Orders(run)
    gone = record((P0, D0))
    write_record(run, FleetRecord(**{name: getattr(gone, name) for name in gone.__struct_fields__} | {"boot": "x"}))
    with pytest.raises(FleetError, match="supervisor of fleet 'f' was killed: nobody can carry this out"):
        orders.Orders(run)


def test_waiting_ends_with_the_fleet_as_ordered_or_says_what_is_missing(run: RunDir) -> None:
    controller = FakeController(Desired(3, (P0, D0)))
    made = given(run, controller)
    ordered = made.change(lambda slots, _: scaled(slots, {"decode": 2}))
    shown: list[FleetRecord] = []
    write_record(run, record((P0, D0, D1), process(P0), process(D0)))
    with pytest.raises(
        FleetError, match=r"^not done within 0 s \(--timeout\), it goes on: decode-1 is not planned yet$"
    ):
        made.wait(ordered, shown.append, 0.0)
    assert len(shown) == 1
    write_record(run, record((P0, D0, D1), process(P0), process(D0), process(D1)))
    assert made.wait(ordered, shown.append, 0.0).desired == (P0, D0, D1)
    write_record(run, record((P0, D0, D1), process(P0), process(D0), process(D1, "given_up", note="died 6 times")))
    with pytest.raises(FleetError, match=r"^decode-1 died 6 times$"):
        made.wait(ordered, shown.append, 9.0)
