"""Meeting through the controller, with a client that asks its decisions directly; NCCL is faked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

from tests.unit.test_nccl_joining import FakeNccl
from vllm_fleet.controller.group_state import Refusal
from vllm_fleet.controller.groups import Groups
from vllm_fleet.core import limits
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import DeadlineExceeded, Fenced, PeerGone
from vllm_fleet.fabric.contract import TransferError
from vllm_fleet.fabric.groups import controlled
from vllm_fleet.fabric.groups.controlled import ControllerRendezvous
from vllm_fleet.fabric.rendezvous import EpochEnded, Meeting, Rendezvous
from vllm_fleet.fabric.transports import group_nccl
from vllm_fleet.fabric.transports.cuda import communicator, joining
from vllm_fleet.fabric.transports.cuda.communicator import Communicator
from vllm_fleet.fabric.transports.cuda.nccl_tuning import Tuning
from vllm_fleet.wire import groups as wire

NO_DEVICE = -1


def soon(seconds: float = 5.0) -> Deadline:
    return Deadline.after(seconds, "test")


class DirectClient:
    """A GroupsClient without network. ``away``: as if the controller did not answer."""

    def __init__(self) -> None:
        self.groups = Groups("run", time.monotonic())
        self.away = False
        self.calls: list[str] = []
        self._changed = threading.Condition()

    def within(self, wait_s: float, setting: str) -> Deadline:
        return soon(wait_s + 2.0)

    def meet(self, name: str, message: wire.Meet, deadline: Deadline) -> wire.MeetAnswer:
        self._tell("meet", lambda: self.groups.meet(name, message, time.monotonic()))
        group: Any = self.groups.find(name)
        answer = self._wait(lambda: group.answer_to(message.who), message.wait_s)
        return answer or wire.Waiting(tuple(sorted(group.awaited())), group.epoch.reason if group.epoch else "")

    def give_id(self, name: str, message: wire.GiveId, deadline: Deadline) -> wire.Come:
        group: Any = self.groups.find(name)
        self._tell("give_id", lambda: group.give_id(message, time.monotonic()))
        come: wire.Come = group.answer_to(message.who)
        return come

    def joined(self, name: str, message: wire.Joined, deadline: Deadline) -> wire.Progress:
        group: Any = self.groups.find(name)
        self._tell("joined", lambda: group.joined(message.who, message.epoch, time.monotonic()))
        progress: wire.Progress = group.progress(message.epoch)
        return progress

    def hold(self, name: str, message: wire.Hold, deadline: Deadline) -> wire.Progress:
        self._tell("hold", lambda: self.groups.hold(name, message, time.monotonic()))
        group: Any = self.groups.find(name)
        self._wait(lambda: group.progress(message.epoch).state != message.known or None, 0.2)
        progress: wire.Progress = group.progress(message.epoch)
        return progress

    def failed(self, name: str, message: wire.Failed, deadline: Deadline) -> None:
        group: Any = self.groups.find(name)
        self._tell("failed", lambda: group.failed(message, time.monotonic()))

    def leave(self, name: str, message: wire.Leave, deadline: Deadline) -> None:
        group: Any = self.groups.find(name)
        if group is not None:
            self._tell("leave", lambda: group.leave(message.who, time.monotonic()))

    def _tell(self, what: str, act: Callable[[], Refusal | None]) -> None:
        with self._changed:
            self.calls.append(what)
            if self.away:
                raise PeerGone("nobody answers")
            refused = act()
            self._changed.notify_all()
        if refused is not None:
            raise Fenced(f"{refused.error} ({refused.status} {refused.code})")

    def _wait(self, look: Callable[[], Any], seconds: float) -> Any:
        with self._changed:
            return self._changed.wait_for(look, seconds)


@pytest.fixture
def client() -> DirectClient:
    return DirectClient()


@pytest.fixture
def made() -> Iterator[list[ControllerRendezvous]]:
    kept: list[ControllerRendezvous] = []
    yield kept
    for one in kept:
        one.close()
    eventually(lambda: "fleet-group-keeper" not in {thread.name for thread in threading.enumerate()})


def pairs(client: DirectClient, made: list[ControllerRendezvous]) -> list[ControllerRendezvous]:
    for name, other in ("ab", "ba"):
        made.append(controlled.pair(client, controlled.attendee(name), other))  # type: ignore[arg-type]
    return made


def met(both: list[ControllerRendezvous]) -> list[Meeting]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda one: one.meet(lambda: one.who.life.encode(), soon()), both))


def eventually(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.002)


def test_both_meet_and_are_in(client: DirectClient, made: list[ControllerRendezvous]) -> None:
    both: list[Rendezvous] = list(pairs(client, made))
    first, second = met(made)
    assert (first.rank, second.rank, first.ranks, first.members) == (0, 1, 2, ("a", "b"))
    assert first.group_id == second.group_id == made[0].who.life.encode()
    assert not both[0].joined(first)
    both[1].joined(second)
    eventually(lambda: both[0].joined(first) and both[1].joined(second))
    assert client.calls.count("joined") == 2, "each says it once, however often it asks"
    made[1].failed(second, "it broke")
    with pytest.raises(EpochEnded, match="given up"):
        made[1].check(second)

    def over() -> bool:
        try:
            made[0].check(first)
        except EpochEnded:
            return True
        return False

    eventually(over)
    with pytest.raises(EpochEnded, match="b reports: it broke"):
        made[0].check(first)
    assert [one.epoch for one in met(made)] == [2, 2]


def test_deadlines_name_who_is_missing(client: DirectClient, made: list[ControllerRendezvous]) -> None:
    pairs(client, made)
    with pytest.raises(DeadlineExceeded, match=r"^b did not finish meeting for group pair-"):
        made[0].meet(lambda: b"", soon(0.05))
    client.away = True
    with pytest.raises(DeadlineExceeded, match=r"^the controller did not finish meeting .* nobody answers"):
        made[0].meet(lambda: b"", soon(0.05))
    client.away = False


def test_an_epoch_survives_its_controller(client: DirectClient, made: list[ControllerRendezvous]) -> None:
    pairs(client, made)
    meetings = met(made)
    for _ in range(2):  # the first time each says that it is in
        for one, meeting in zip(made, meetings, strict=True):
            eventually(lambda one=one, meeting=meeting: one.joined(meeting) or one is made[0])  # type: ignore[misc]
    client.away = True
    asked = client.calls.count("hold")
    eventually(lambda: client.calls.count("hold") > asked + 2)
    client.groups = Groups("another run", time.monotonic())
    client.away = False
    eventually(lambda: client.groups.find(made[0].group) is not None)
    group: Any = client.groups.find(made[0].group)
    eventually(lambda: not group.epoch.unheard)
    for one, meeting in zip(made, meetings, strict=True):
        one.check(meeting)


def test_a_later_life_fences_the_former(client: DirectClient, made: list[ControllerRendezvous]) -> None:
    pairs(client, made)
    met(made)
    made.append(controlled.pair(client, controlled.attendee("a"), "b"))  # type: ignore[arg-type]
    with pytest.raises(DeadlineExceeded):
        made[2].meet(lambda: b"", soon(0.05))
    with pytest.raises(Fenced, match="replaced"):
        made[0].meet(lambda: b"", soon())


def test_an_id_that_cannot_be_made_is_reported(client: DirectClient, made: list[ControllerRendezvous]) -> None:
    pairs(client, made)

    def broken() -> bytes:
        raise TransferError("no device")

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(made[1].meet, lambda: b"", soon(0.5))
        with pytest.raises(TransferError, match="no device"):
            made[0].meet(broken, soon())
        with pytest.raises(DeadlineExceeded, match="a reports: making the id: no device"):
            other.result()


def test_the_nccl_transports_communicator_meets_through_it(
    client: DirectClient, made: list[ControllerRendezvous], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeNccl()
    calls: Any = SimpleNamespace(Comm=lambda ptr: ptr)
    monkeypatch.setattr(joining, "library", lambda: fake)
    monkeypatch.setattr(communicator, "library", lambda: fake)
    monkeypatch.setattr("importlib.import_module", lambda name: calls)
    pairs(client, made)
    with ThreadPoolExecutor(2) as pool:
        formed = list(pool.map(lambda one: Communicator(one, NO_DEVICE, Tuning(lanes=4), lambda: None, soon()), made))
    assert [one.lanes for one in formed] == [4, 4]
    for one in formed:
        one.abort()
    assert joining.settle(soon())
    assert not fake.alive


# Non-blocking NCCL ----------------------------------------------------------------------------------------------------


class NonBlocking:
    """NCCL as far as non-blocking joining goes."""

    def __init__(self) -> None:
        self.here: dict[bytes, set[int]] = {}
        self.alive: set[Comm] = set()
        self.dismissed: set[bytes] = set()
        self.error = 0
        self.Communicator = self
        self.UniqueId = SimpleNamespace(from_bytes=bytes)

    def NCCLConfig(self, blocking: bool) -> None:  # noqa: N802 - NCCL's name
        assert not blocking

    def get_unique_id(self) -> bytes:
        return bytes(limits.NCCL_ID_BYTES)

    def get_error_string(self, number: int) -> str:
        return "remote error"

    def init(self, ranks: int, rank: int, unique_id: bytes, config: None) -> Comm:
        if ranks == 1:
            self.dismissed.add(unique_id)
        self.here.setdefault(unique_id, set()).add(rank)
        comm = Comm(self, ranks, unique_id)
        self.alive.add(comm)
        return comm


class Comm:
    ptr = 1

    def __init__(self, nccl: NonBlocking, ranks: int, unique_id: bytes) -> None:
        self._nccl, self._ranks, self._id = nccl, ranks, unique_id

    def get_async_error(self) -> int:
        return self._nccl.error or (0 if len(self._nccl.here[self._id]) >= self._ranks else 7)

    def abort(self) -> None:
        self._nccl.alive.remove(self)


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> NonBlocking:
    fake = NonBlocking()
    monkeypatch.setattr(group_nccl, "library", lambda: fake)
    return fake


def test_joining_over_nccl_is_given_up_at_the_deadline(nccl: NonBlocking) -> None:
    backend = group_nccl.NcclBackend(NO_DEVICE)
    group_id = backend.create_id()
    with pytest.raises(DeadlineExceeded, match="the others did not finish joining over NCCL"):
        backend.join(Meeting(0, 3, 1, group_id), lambda: None, soon(0.02))
    assert not nccl.alive
    backend.discard(group_id)
    eventually(lambda: nccl.dismissed == {group_id} and not nccl.alive)


def test_joining_over_nccl_ends_with_the_epoch_and_with_an_error(nccl: NonBlocking) -> None:
    backend = group_nccl.NcclBackend(NO_DEVICE)

    def over() -> None:
        if nccl.alive:
            raise EpochEnded("b died")

    with pytest.raises(EpochEnded):
        backend.join(Meeting(1, 2, 1, backend.create_id()), over, soon())
    assert not nccl.alive
    nccl.error = 6
    with pytest.raises(TransferError, match="remote error"):
        backend.join(Meeting(1, 2, 1, backend.create_id()), lambda: None, soon())
    assert not nccl.alive
