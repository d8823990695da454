"""Several controllers on a real etcd: one leads, whatever is killed, stopped or late. Tests play the members."""

from __future__ import annotations

import asyncio
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.contract.etcd_server import ETCD, MISSING, EtcdServer
from tests.contract.store_owners import journal_of
from tests.faults.etcd_fleet import BEARER, Client, Controllers, HoldingProxy, Members, eventually
from vllm_fleet.config.etcd import EtcdSettings
from vllm_fleet.core.errors import Busy, FleetError, NotLeader, PeerGone
from vllm_fleet.net.watch import watch
from vllm_fleet.wire.control import Change, Snapshot, WatchEvent

pytestmark = pytest.mark.timeout(120)

MOVED_S = 5.0


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    if ETCD is None:
        pytest.skip(MISSING)
    server = EtcdServer(tmp_path / "etcd")
    yield server
    server.kill()


@pytest.fixture
def controllers(etcd: EtcdServer, tmp_path: Path) -> Iterator[Controllers]:
    found = Controllers(tmp_path, {"endpoints": [etcd.url]})
    yield found
    found.close()


@pytest.fixture
def members() -> Iterator[Callable[[Client, int], Members]]:
    made: list[Members] = []

    def make(client: Client, count: int) -> Members:
        made.append(Members(client, count))
        eventually("all have joined", lambda: len(made[-1].answers) >= count)
        return made[-1]

    yield make
    for one in made:
        one.close()


class Follower:
    """A watcher, as a router is one, in a thread of its own."""

    def __init__(self, urls: list[str]) -> None:
        self.events: list[WatchEvent] = []
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(watch(urls, BEARER, self.events.append))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(asyncio.gather(self._task, return_exceptions=True))
        finally:
            self._loop.close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(10)


def lives(snapshot: Snapshot | None) -> list[tuple[str, str, int]]:
    assert snapshot is not None
    return sorted((member.name, member.incarnation, member.generation) for member in snapshot.members)


def journal(etcd: EtcdServer) -> bytes:
    return journal_of(EtcdSettings((etcd.url,)), "test")


def test_when_the_leader_is_killed_another_leads_in_time(
    controllers: Controllers, members: Callable[[Client, int], Members]
) -> None:
    controllers.start("a", "b", "c")
    first = controllers.await_leader()
    joined = members(controllers.client(), 4)
    follower = Follower(list(controllers.urls.values()))
    eventually("the follower knows them", lambda: len(follower.events) >= 1)
    before = controllers.client().try_snapshot()
    assert before is not None
    controllers.signal(first, signal.SIGKILL)
    killed = time.monotonic()
    others = [name for name in controllers.urls if name != first]
    client = controllers.client(*others)
    eventually("another one leads", lambda: client.try_snapshot() is not None)
    assert time.monotonic() - killed < MOVED_S
    after = client.try_snapshot()
    assert after is not None
    assert (lives(after), after.controller) == (lives(before), before.controller)
    beats = joined.beats
    eventually("heartbeats go on", lambda: joined.beats > beats + 8)
    fresh = client.join("new", "life")
    assert fresh.generation == max(generation for _, _, generation in lives(before)) + 1
    eventually(
        "the follower goes on where it was",
        lambda: any(isinstance(event, Change) and event.member.name == "new" for event in follower.events),
    )
    follower.close()
    snapshots = {event.controller for event in follower.events if isinstance(event, Snapshot)}
    assert snapshots == {before.controller}
    assert joined.fenced == 0
    assert not any(isinstance(event, Change) and event.member.state == "gone" for event in follower.events)
    second = controllers.await_leader(*others)
    controllers.start(first)
    health = controllers.health(first)
    assert health is not None
    assert health["status"] == "standby"
    with pytest.raises(NotLeader) as refused:
        controllers.client(first).join("x", "y")
    assert refused.value.leader == controllers.urls[second]


def test_a_stopped_leaders_late_write_is_refused_by_etcd(
    etcd: EtcdServer, controllers: Controllers, tmp_path: Path
) -> None:
    """The write is held on its way to etcd, the leader stopped past its lease, and only then the write let through."""
    proxy = HoldingProxy(etcd.port)
    controllers.etcd["a"] = {"endpoints": [proxy.url], "lease_s": 2}
    controllers.start("a")
    assert controllers.await_leader("a") == "a"
    controllers.start("b")
    known = controllers.client("a").join("early", "life-1")
    outcome: list[object] = []

    def join_late() -> None:
        try:
            outcome.append(controllers.client("a").join("late", "life-of-a", within_s=30.0))
        except FleetError as error:
            outcome.append(error)

    def read_late() -> None:
        outcome.append(controllers.client("a").try_snapshot(within_s=30.0))

    proxy.arm()
    joining, reading = threading.Thread(target=join_late), threading.Thread(target=read_late)
    joining.start()
    assert proxy.held.wait(10), "the leader did not try to save"
    controllers.signal("a", signal.SIGSTOP)
    assert controllers.await_leader("b") == "b"
    reading.start()  # the kernel takes the question: it is answered when the leader of old goes on
    before = journal(etcd)
    proxy.release()
    assert proxy.answered.wait(10), "etcd did not answer the late write"
    assert b'"responses"' in proxy.answer, proxy.answer
    assert b'"succeeded":true' not in proxy.answer
    assert journal(etcd) == before
    there = controllers.client("b").join("late", "life-of-b")
    assert there.generation == known.generation + 1
    controllers.signal("a", signal.SIGCONT)
    joining.join(30)
    reading.join(30)
    proxy.close()
    assert len(outcome) == 2
    assert all(found is None or isinstance(found, Busy | PeerGone) for found in outcome), outcome
    eventually("the leader of old stands by", lambda: (controllers.health("a") or {}).get("status") == "standby")
    assert "leader.lost" in controllers.log("a") or "journal.fenced" in controllers.log("a")
    assert controllers.await_leader() == "b"
    found = lives(controllers.client("b").try_snapshot())
    assert found == [("early", "life-1", known.generation), ("late", "life-of-b", there.generation)]


def test_no_generation_is_given_twice_while_leaders_are_stopped_and_continued(controllers: Controllers) -> None:
    controllers.start("a", "b")
    controllers.await_leader()
    given: list[tuple[int, str]] = []
    closing = threading.Event()

    def join(number: int) -> None:
        client = controllers.client("a", "b") if number % 2 else controllers.client("b", "a")
        while not closing.is_set():
            life = secrets.token_hex(8)
            try:
                given.append((client.join(f"n{number}", life).generation, life))
            except FleetError:
                closing.wait(0.05)

    threads = [threading.Thread(target=join, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    moved = 0
    for _ in range(3):
        stopped = controllers.await_leader("a", "b")
        already = len(given)
        eventually("it grants", lambda already=already: len(given) > already + 5)  # type: ignore[misc]
        controllers.signal(stopped, signal.SIGSTOP)
        other = "b" if stopped == "a" else "a"
        eventually("the other one leads", lambda other=other: controllers.leader(other) is not None)  # type: ignore[misc]
        already = len(given)
        eventually("the other one grants", lambda already=already: len(given) > already + 5)  # type: ignore[misc]
        controllers.signal(stopped, signal.SIGCONT)
        eventually(
            "it stands by",
            lambda stopped=stopped: (controllers.health(stopped) or {}).get("status") == "standby",  # type: ignore[misc]
        )
        moved += 1
    closing.set()
    for thread in threads:
        thread.join(10)
    assert moved == 3
    generations = [generation for generation, _ in given]
    assert len(set(generations)) == len(generations), "a generation was given to two lives"
    assert len(generations) > 30


@pytest.mark.parametrize("away_s", [1.0, 6.0])
def test_etcd_may_be_killed_and_started_again(
    etcd: EtcdServer, controllers: Controllers, members: Callable[[Client, int], Members], away_s: float
) -> None:
    controllers.start("a", "b")
    controllers.await_leader()
    joined = members(controllers.client("a", "b"), 3)
    follower = Follower(list(controllers.urls.values()))
    client = controllers.client("a", "b")
    before = client.try_snapshot()
    etcd.kill()
    began = time.monotonic()
    refused = 0
    while time.monotonic() - began < away_s:
        with pytest.raises((Busy, PeerGone)):
            client.join("new", "life", within_s=1.0)
        refused += 1
    assert refused > 0
    for name in ("a", "b"):
        health = controllers.health(name)
        assert health is not None, f"{name} does not answer"
        assert health["durable"] is False
    etcd.start()

    def works() -> bool:
        try:
            return client.join("new", "life").generation > 0
        except FleetError:
            return False

    eventually("joins go on", works)
    beats = joined.beats
    eventually("heartbeats go on", lambda: joined.beats > beats + 6)
    after = client.try_snapshot()
    assert after is not None
    assert set(lives(before)) < set(lives(after))
    assert joined.fenced == 0
    assert {generation for generation, _, _ in joined.answers} == {generation for _, _, generation in lives(before)}
    follower.close()
    assert not any(isinstance(event, Change) and event.member.state == "gone" for event in follower.events)


def test_a_controller_that_is_started_again_need_not_wait_for_its_own_lease(controllers: Controllers) -> None:
    controllers.etcd["a"] = {**controllers.etcd["a"], "lease_s": 60}
    controllers.start("a")
    controllers.await_leader("a")
    granted = controllers.client("a").join("m", "life")
    controllers.signal("a", signal.SIGKILL)
    controllers.start("a")
    eventually("it leads again", lambda: controllers.client("a").try_snapshot() is not None, within_s=10.0)
    assert controllers.client("a").join("m", "life").generation == granted.generation


def test_a_leader_told_to_stop_hands_over_at_once(controllers: Controllers) -> None:
    for name in "ab":
        controllers.etcd[name] = {**controllers.etcd[name], "lease_s": 60}
    controllers.start("a")
    controllers.await_leader("a")
    controllers.start("b")
    granted = controllers.client("a").join("m", "life")
    controllers.signal("a", signal.SIGTERM)
    eventually("b leads", lambda: controllers.client("b").try_snapshot() is not None, within_s=10.0)
    assert controllers.client("a", "b").join("m", "life").generation == granted.generation
    assert controllers.stop("a") == 0


def test_an_etcd_that_cannot_be_reached_at_the_start_is_a_clear_error(
    controllers: Controllers, etcd: EtcdServer
) -> None:
    etcd.kill()
    assert controllers.launch("a").wait(20) == 2
    said = controllers.log("a")
    assert f"controller.etcd: etcd at {etcd.url}: Connection refused" in said
    assert "Traceback" not in said


def test_credentials_are_used_and_never_shown(controllers: Controllers, etcd: EtcdServer, tmp_path: Path) -> None:
    password = secrets.token_hex(16)
    for command in (
        "user add root:ignored", "user grant-role root root", f"user add fleet:{password}", "role add fleets",
        "role grant-permission fleets readwrite --prefix=true /vllm-fleet/", "user grant-role fleet fleets",
        "auth enable",
    ):  # fmt: skip
        argv = ["etcdctl", "--endpoints", etcd.url, *command.split()]
        subprocess.run(argv, check=True, capture_output=True, env={"ETCDCTL_API": "3"})
    file = tmp_path / "credentials"
    file.touch(mode=0o600)
    file.write_text("fleet:wrong\n")
    controllers.etcd["a"] = {"endpoints": [etcd.url], "credentials_file": str(file)}
    assert controllers.launch("a").wait(20) == 2
    assert "authentication failed" in controllers.log("a")
    file.write_text(f"fleet:{password}\n")
    controllers.start("a")
    controllers.await_leader("a")
    assert controllers.client("a").join("m", "life").generation == 1
    for shown in (controllers.log("a"), controllers.cmdline("a"), (tmp_path / "a.json").read_text()):
        assert password not in shown
