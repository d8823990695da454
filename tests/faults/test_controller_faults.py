"""Faults of one real controller with its journal on disk. Tests play the members, and see that each fault happened."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.faults.controller_fleet import (
    LEASE_S,
    Cable,
    Controller,
    PlayedMembers,
    SmallDisk,
    View,
    small_disk,
)
from tests.faults.etcd_fleet import eventually
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import BadRequest, Busy, FleetError
from vllm_fleet.wire.control import Heartbeat, Register

pytestmark = pytest.mark.timeout(90)

FAKETIME = next(iter(sorted(Path("/usr/lib").glob("*-linux-gnu/faketime/libfaketime.so.1"))), None)
YEARS_S = 10 * 365 * 24 * 3600


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


@pytest.fixture
def controller(tmp_path: Path, stack: ExitStack) -> Controller:
    found = Controller(tmp_path)
    stack.callback(found.close)
    return found


@pytest.fixture
def played(tmp_path: Path, stack: ExitStack) -> Callable[..., PlayedMembers]:
    def make(controller: Controller, count: int, **options: object) -> PlayedMembers:
        members = PlayedMembers(controller, tmp_path, count, **options)  # type: ignore[arg-type]
        stack.callback(members.close)
        return members

    return make


def watching(stack: ExitStack, controller: Controller, url: str = "") -> View:
    """A view that has caught up."""
    view = View(url or controller.url, controller.bearer)
    stack.callback(view.close)
    eventually("the view has caught up", lambda: view.events > 0 and view.members == controller.lives())
    return view


def once_each(answers: list[tuple[int, str, str]]) -> None:
    """No generation was given to two lives, and none of a name is older than one before it."""
    owners: dict[int, tuple[str, str]] = {}
    newest: Counter[str] = Counter()
    for generation, name, life in answers:
        assert owners.setdefault(generation, (name, life)) == (name, life), f"generation {generation} was given twice"
        assert generation >= newest[name], f"{name} went back from generation {newest[name]} to {generation}"
        newest[name] = generation


# Two of them (9) ------------------------------------------------------------------------------------------------------


def test_a_second_controller_of_the_same_folder_is_refused_and_told_who_holds_it(
    controller: Controller, tmp_path: Path
) -> None:
    controller.start()
    assert controller.process is not None
    second = Controller(tmp_path / "second", state_dir=controller.state_dir)
    refused = second.launch()
    assert refused.ended() == 2
    assert f"is used by another controller, process {controller.process.pid}" in refused.log()
    assert "Traceback" not in refused.log()
    assert controller.is_durable()
    controller.client().join("m", "life")


def test_two_fleets_on_one_host_share_nothing(controller: Controller, tmp_path: Path, stack: ExitStack) -> None:
    other = Controller(tmp_path / "other", "other", token=bytes(range(32, 64)))
    stack.callback(other.close)
    controller.start()
    other.start()
    assert controller.client().join("m", "life-of-test").generation == 1
    assert other.client().join("m", "life-of-other").generation == 1
    for mine, theirs in ((controller, other), (other, controller)):
        with pytest.raises(BadRequest, match="401"):
            mine.client(theirs.url).join("m", "stranger")
    assert controller.lives() == {"m": ("life-of-test", 1)}
    assert other.lives() == {"m": ("life-of-other", 1)}
    other.kill()
    stray = Controller(tmp_path / "stray", "stray", state_dir=other.state_dir).launch()
    assert stray.ended() == 2
    assert "the journal belongs to fleet 'other', this is fleet 'stray'" in stray.log()


# Cut off (11, 12) -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("directions", [("up",), ("down",), ("up", "down")], ids="-".join)
def test_a_controller_that_is_cut_off_loses_nobody(
    controller: Controller, played: Callable[..., PlayedMembers], stack: ExitStack, directions: tuple[str, ...]
) -> None:
    """For longer than a lease it hears nobody, or nobody hears it."""
    controller.start()
    cable = Cable(controller.port)
    stack.callback(cable.close)
    members = played(controller, 3, url=cable.url)
    eventually("all are ready", lambda: controller.all_ready(*members.names))
    view = watching(stack, controller, cable.url)
    before = controller.lives()
    cable.cut(*directions)
    cut_at = time.monotonic()
    if "up" in directions:
        eventually("all are suspect", lambda: set(controller.states().values()) == {"suspect"})
    while time.monotonic() - cut_at < LEASE_S + 0.5:
        assert view.members == before, "the view did not outlive the cut"
        assert controller.lives().keys() == before.keys()
        time.sleep(0.1)
    for direction in directions:
        assert cable.held_bytes[direction] > 0, "nothing was cut off"
    cable.mend()
    eventually("all are ready again", lambda: controller.all_ready(*members.names), LEASE_S + 5.0)
    eventually("the view agrees", lambda: view.states == controller.states(), LEASE_S + 5.0)
    members.await_beats()
    assert controller.lives() == view.members == before
    assert view.gone == []
    assert len(view.journals) == 1
    once_each(members.answers)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_one_way_loss_of_one_member_ends_in_agreement(
    controller: Controller, played: Callable[..., PlayedMembers], stack: ExitStack, direction: str
) -> None:
    """The controller does not hear it: it is lost, and comes back once as a new generation. It does not hear the
    controller: nobody loses it.
    """
    controller.start()
    cable = Cable(controller.port)
    stack.callback(cable.close)
    others = [controller.client().join(f"other-{number}", "life") for number in range(2)]
    view = watching(stack, controller)
    beating = threading.Event()

    def beat() -> None:
        client = controller.client()
        while not beating.wait(0.1):
            for number, other in enumerate(others):
                client.heartbeat(f"other-{number}", _ready(other.generation), Deadline.after(2.0, "test"))

    thread = threading.Thread(target=beat)
    thread.start()
    stack.callback(thread.join)
    stack.callback(beating.set)
    members = played(controller, 1, url=cable.url)
    before = controller.lives()
    cable.cut(direction)
    if direction == "up":
        eventually("it is gone", lambda: "m0" not in controller.lives(), LEASE_S + 5.0)
    else:
        deadline = time.monotonic() + LEASE_S + 0.5
        while time.monotonic() < deadline:
            assert controller.lives() == before
            time.sleep(0.1)
    assert cable.held_bytes[direction] > 0
    cable.mend()
    eventually("both agree", lambda: controller.states().get("m0") == "ready", LEASE_S)
    members.await_beats()
    life, generation = controller.lives()["m0"]
    assert (generation, "m0", life) == members.answers[-1]
    assert len(members.answers) == (2 if direction == "up" else 1), members.answers
    eventually("the view agrees", lambda: view.members == controller.lives())
    assert view.gone == (["m0"] if direction == "up" else [])
    once_each(members.answers)


def _ready(generation: int) -> Heartbeat:
    return Heartbeat(generation, "ready")


# Time (39) ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["controller", "everybody"])
def test_a_pause_longer_than_a_lease_costs_nobody_anything(
    controller: Controller, played: Callable[..., PlayedMembers], stack: ExitStack, who: str
) -> None:
    controller.start()
    members = played(controller, 3)
    eventually("all are ready", lambda: controller.all_ready(*members.names))
    view = watching(stack, controller)
    before = controller.lives()
    assert controller.process is not None
    paused = [controller.process, *([members.process] if who == "everybody" else [])]
    for process in paused:
        process.pause()
    assert controller.health() is None
    time.sleep(LEASE_S + 0.5)
    assert view.members == before
    for process in paused:
        process.resume()
    members.await_beats()
    eventually("all are ready again", lambda: controller.all_ready(*members.names), LEASE_S + 5.0)
    eventually("the view agrees", lambda: view.states == controller.states())
    assert controller.lives() == view.members == before
    assert view.gone == []
    assert len(members.answers) == 3


def test_wall_clocks_may_jump_by_an_hour_and_by_ten_years(
    controller: Controller, played: Callable[..., PlayedMembers], stack: ExitStack, tmp_path: Path
) -> None:
    if FAKETIME is None:
        pytest.skip("not run: wall clocks that jump need libfaketime (Debian: libfaketime)")
    clock = tmp_path / "clock"

    def jump(seconds: int) -> None:
        clock.write_text(f"{seconds:+d}s\n")

    jump(0)
    env = {
        "LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1", "FAKETIME_DONT_RESET": "1",
    }  # fmt: skip
    controller.env = env
    controller.start()
    members = played(controller, 3, env=env)
    eventually("all are ready", lambda: controller.all_ready(*members.names))
    view = watching(stack, controller)
    before = controller.lives()
    for number, seconds in enumerate((3600, -3600, YEARS_S, -YEARS_S)):
        jump(seconds)
        controller.client().join(f"new-{number}", "life")
        there = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + seconds))[:13]
        assert there in controller.log_end(), "the controller's clock did not jump"
        members.await_beats()
        assert controller.lives().items() >= before.items()
    played_states = {name: view.states[name] for name in members.names}
    assert played_states == dict.fromkeys(members.names, "ready")
    assert set(view.gone) <= {f"new-{number}" for number in range(4)}, "a member was lost"
    assert len(members.answers) == 3
    controller.kill()
    controller.start()
    members.await_beats()
    assert controller.lives().items() >= before.items()


# Disk (36) ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path, stack: ExitStack) -> SmallDisk:
    if os.geteuid() != 0:
        pytest.skip("not run: a disk of its own needs root")
    try:
        return stack.enter_context(small_disk(tmp_path / "disk"))
    except OSError as error:
        pytest.skip(f"not run: this system mounts nothing here: {error}")


def big(name: str) -> Register:
    """A life that takes most of a page of the disk."""
    fingerprint = {str(number): "x" * 250 for number in range(13)}
    return Register(name, "both", f"http://{name}:1", 1, f"life-of-{name}", "ready", fingerprint)


def test_a_full_disk_stops_joins_only(
    tmp_path: Path, stack: ExitStack, disk: SmallDisk, played: Callable[..., PlayedMembers]
) -> None:
    controller = Controller(tmp_path, state_dir=disk.folder / "state")
    stack.callback(controller.close)
    controller.start()
    members = played(controller, 2)
    view = watching(stack, controller)
    client = controller.client()
    granted = {"early": client.register(big("early"), Deadline.after(5.0, "test")).generation}
    disk.fill()
    with contextlib.suppress(Busy):  # the journal's last page may have room for one
        granted["late"] = client.register(big("late"), Deadline.after(5.0, "test")).generation
    for number in range(5):
        with pytest.raises(Busy, match="not_durable"):
            client.register(big(f"later-{number}"), Deadline.after(5.0, "test"))
    assert controller.health() is not None
    assert not controller.is_durable()
    members.await_beats()
    client.deregister("early", granted.pop("early"), Deadline.after(5.0, "test"))
    eventually("watches go on", lambda: "early" not in view.members and len(view.journals) == 2)
    disk.free()
    eventually("it saves again", controller.is_durable)
    granted["after"] = client.register(big("after"), Deadline.after(5.0, "test")).generation
    members.await_beats()
    known = controller.lives()
    controller.kill()
    controller.start()
    assert controller.lives() == known
    assert {name: known[name][1] for name in granted if name in known} == granted
    assert set(known) >= {*members.names, "after"}
    assert len(members.answers) == 2
    eventually("the view agrees", lambda: view.members == controller.lives())


def test_a_read_only_disk_is_a_clear_refusal_and_loses_nothing(
    tmp_path: Path, stack: ExitStack, disk: SmallDisk, played: Callable[..., PlayedMembers]
) -> None:
    """A disk that turns read-only under open files acts as a full one; here a restart meets it."""
    controller = Controller(tmp_path, state_dir=disk.folder / "state")
    stack.callback(controller.close)
    controller.start()
    members = played(controller, 2)
    view = watching(stack, controller)
    before = controller.lives()
    controller.kill()
    disk.make_read_only()
    refused = controller.launch()
    assert refused.ended() == 2
    assert "state_dir: cannot use" in refused.log()
    assert "Read-only file system" in refused.log()
    assert "Traceback" not in refused.log()
    assert view.members == before, "who watches keeps the last view"
    disk.make_writable()
    controller.start()
    members.await_beats()
    assert controller.lives() == before
    assert len(members.answers) == 2


def test_a_journal_that_is_cut_short_between_kills_costs_no_number(
    controller: Controller, played: Callable[..., PlayedMembers], stack: ExitStack
) -> None:
    controller.start()
    members = played(controller, 4)
    view = watching(stack, controller)
    for cut_bytes in (1, 9, 150, 10_000):
        controller.kill()
        whole = controller.journal.read_bytes()
        controller.journal.write_bytes(whole[: max(0, len(whole) - cut_bytes)])
        controller.start()
        fresh = controller.client().join(f"new-{cut_bytes}", "life")
        assert fresh.generation > max(generation for generation, _, _ in members.answers)
        ready = dict.fromkeys(members.names, "ready").items()
        eventually("all are ready", lambda ready=ready: controller.states().items() >= ready)  # type: ignore[misc]
        eventually("members know", lambda: controller.lives().items() >= members.newest().items())
        eventually("the view agrees", lambda: view.members == controller.lives())
    once_each(members.answers)
    assert len({life for _, _, life in members.answers}) == 4


# Restarts (45) --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("journal", ["there", "lost", "older", "folder lost"])
def test_after_a_restart_the_fleet_is_as_it_was(
    controller: Controller, played: Callable[..., PlayedMembers], stack: ExitStack, journal: str, tmp_path: Path
) -> None:
    controller.start()
    early = controller.client().join("early", "left-before-the-restart")
    copy = shutil.copy(controller.journal, tmp_path / "copy")
    controller.client().deregister("early", early.generation, Deadline.after(5.0, "test"))
    members = played(controller, 4)
    view = watching(stack, controller)
    before, given = controller.lives(), list(members.answers)
    controller.kill()
    if journal == "lost":
        controller.journal.unlink()
    elif journal == "older":
        shutil.copy(copy, controller.journal)
    elif journal == "folder lost":
        shutil.rmtree(controller.state_dir)
    controller.start()
    fresh = controller.client().join("fresh", "life")
    took_s = eventually(
        "all are back", lambda: all(controller.states().get(name) == "ready" for name in members.names), 10.0
    )
    assert took_s < 10.0
    eventually("the view agrees", lambda: view.members == controller.lives())
    now = {name: controller.lives()[name] for name in members.names}
    assert {name: life for name, (life, _) in now.items()} == {name: life for name, (life, _) in before.items()}
    if journal == "there":
        assert now == before
        assert members.answers == given
        assert len(view.journals) == 1
    else:
        assert len(view.journals) == 2, "what follows must not look like the history before"
    if journal == "folder lost":
        view.wrong.clear()  # nothing is left that could say which numbers were given out
    else:
        assert fresh.generation > max(generation for generation, _, _ in given)
        once_each([*members.answers, (fresh.generation, "fresh", "life")])
    if journal in ("lost", "older"):
        assert "journal.older" in controller.log_end()


def test_a_controller_killed_again_and_again_under_load_forgets_nothing(
    controller: Controller, played: Callable[..., PlayedMembers], stack: ExitStack
) -> None:
    """kill -9 in the middle of heartbeats, registrations, departures and watches."""
    controller.rule(lease_s=120.0)  # those who join here send no heartbeats, and nobody is to be lost to silence
    controller.start()
    members = played(controller, 6)
    views = [watching(stack, controller) for _ in range(3)]
    closing = threading.Event()
    stack.callback(closing.set)
    granted: list[tuple[int, str, str]] = []
    leaving: set[str] = set()  # asked to; the answer may have died with the controller
    left: set[str] = set()

    def join_and_leave(number: int) -> None:
        client, count = controller.client(), 0
        while not closing.wait(0.01):
            name, count = f"n{number}-{count}", count + 1
            try:
                made = client.join(name, f"life-of-{name}")
                granted.append((made.generation, name, f"life-of-{name}"))
                if count % 2:
                    leaving.add(name)
                    client.deregister(name, made.generation, Deadline.after(2.0, "test"))
                    left.add(name)
            except FleetError:
                continue

    joining = [threading.Thread(target=join_and_leave, args=(number,)) for number in range(3)]
    for thread in joining:
        thread.start()
    for _ in range(4):
        already = len(granted)
        eventually("it grants", lambda already=already: len(granted) > already + 20)  # type: ignore[misc]
        controller.kill()
        acknowledged, departed = list(granted), set(left)
        controller.start()
        lives = controller.lives()
        lost = [each for each in acknowledged if lives.get(each[1]) != (each[2], each[0])]
        assert [each for each in lost if each[1] not in leaving] == []
        assert not departed & lives.keys(), "who left is back"
    closing.set()
    for thread in joining:
        thread.join(10)
    known = controller.lives()
    controller.kill()
    controller.start()
    assert {name: life for name, life in known.items() if life != controller.lives().get(name)} == {}
    once_each(sorted([*granted, *members.answers]))
    assert len(members.answers) == 6
    for view in views:
        eventually("the view agrees", lambda view=view: view.members == controller.lives())  # type: ignore[misc]
        assert len(view.journals) == 1
        assert not set(view.gone) & set(members.names)
    assert len(granted) > 80
