"""Joining communicators cannot be called off: what was begun is ended, whoever gives up and when. NCCL is faked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from vllm_fleet.core import limits
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import LinkError, PeerGone
from vllm_fleet.fabric.contract import TransferError
from vllm_fleet.fabric.rendezvous import Meeting

pytest.importorskip("torch")
from vllm_fleet.fabric.transports.cuda import communicator, joining
from vllm_fleet.fabric.transports.cuda.communicator import Communicator
from vllm_fleet.fabric.transports.cuda.nccl_tuning import Tuning

NO_DEVICE = -1
LANES = Tuning(lanes=3)
peers: list[threading.Thread] = []
"""The other sides of one test."""


class FakeNccl:
    """NCCL as far as joining goes: an id is open until all ranks have come; a rank that comes waits for the others."""

    class UniqueId:
        @staticmethod
        def from_bytes(content: bytes) -> bytes:
            return content

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self.ids: list[bytes] = []
        self.come: dict[bytes, list[int]] = {}
        self.ranks: dict[bytes, int] = {}
        self.alive: list[FakeComm] = []
        self.Communicator = self
        self.NCCLConfig = dict

    def get_unique_id(self) -> bytes:
        self.ids.append(len(self.ids).to_bytes(limits.NCCL_ID_BYTES))
        return self.ids[-1]

    def init(self, ranks: int, rank: int, unique_id: bytes, config: object) -> FakeComm:
        with self._lock:
            self.come.setdefault(unique_id, []).append(rank)
            self.ranks[unique_id] = ranks
            self._lock.notify_all()
            assert self._lock.wait_for(lambda: len(self.come[unique_id]) == ranks, 5)
            made = FakeComm(self)
            self.alive.append(made)
            return made

    def open_ids(self) -> list[bytes]:
        """Ids that still have a thread and a socket."""
        return [one for one in self.ids if len(self.come.get(one, [])) < self.ranks.get(one, 1)]


class FakeComm:
    ptr = 1

    def __init__(self, nccl: FakeNccl) -> None:
        self._nccl = nccl

    def abort(self) -> None:
        self._nccl.alive.remove(self)


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNccl]:
    fake = FakeNccl()
    calls: Any = type("Calls", (), {"Comm": staticmethod(lambda ptr: ptr)})
    monkeypatch.setattr(joining, "library", lambda: fake)
    monkeypatch.setattr(communicator, "library", lambda: fake)
    monkeypatch.setattr("importlib.import_module", lambda name: calls)
    peers.clear()
    yield fake
    for thread in peers:
        thread.join(5)
    assert joining.settle(Deadline.after(5, "test"))
    assert not fake.alive, "a communicator was left"
    assert not fake.open_ids(), "an id was left with its thread and socket"


class Meets:
    """A Rendezvous of rank 0."""

    def __init__(self, meet: Callable[[bytes], object] = lambda group_id: None) -> None:
        self._meet = meet

    def meet(self, create: Callable[[], bytes], deadline: Deadline) -> Meeting:
        group_id = create()
        self._meet(group_id)
        return Meeting(0, 2, 1, group_id)

    def joined(self, meeting: Meeting) -> bool:
        return True


def soon() -> Deadline:
    return Deadline.after(5, "test")


def peer(group_id: bytes, pause_s: float = 0.0) -> threading.Thread:
    """The other side, which joins every lane and keeps nothing."""

    def work() -> None:
        time.sleep(pause_s)
        other = joining.Joining(Meeting(1, 2, 1, group_id), LANES)
        other.join()
        other.give_up()

    thread = threading.Thread(target=work)
    peers.append(thread)
    thread.start()
    return thread


def test_both_sides_join_every_lane(nccl: FakeNccl) -> None:
    made = Communicator(Meets(lambda group_id: peer(group_id).name), NO_DEVICE, LANES, lambda: None, soon())
    assert made.lanes == 3
    made.abort()
    made.abort()


def test_a_join_that_was_given_up_goes_on_through_every_lane(nccl: FakeNccl) -> None:
    """As when a cancel comes while the link meets again: the other side is, or will be, in all of them."""
    looked = 0

    def watch() -> None:
        nonlocal looked
        looked += 1
        if looked > 1:
            raise TransferError("cancelled")

    met: list[bytes] = []
    with pytest.raises(TransferError, match="cancelled"):
        Communicator(Meets(met.append), NO_DEVICE, LANES, watch, soon())
    assert joining.calls_apart() > 0
    peer(met[0]).join(5)


def test_a_refused_id_is_called_off(nccl: FakeNccl) -> None:
    def refuse(group_id: bytes) -> None:
        raise LinkError("refused to join")

    with pytest.raises(LinkError, match="refused"):
        Communicator(Meets(refuse), NO_DEVICE, LANES, lambda: None, soon())
    assert joining.settle(soon())
    assert set(nccl.ranks.values()) == {1}


def test_an_id_whose_answer_was_not_heard_is_joined_all_the_same(nccl: FakeNccl) -> None:
    met: list[bytes] = []

    def unheard(group_id: bytes) -> None:
        met.append(group_id)
        raise PeerGone("the connection broke")

    with pytest.raises(PeerGone, match="broke"):
        Communicator(Meets(unheard), NO_DEVICE, LANES, lambda: None, soon())
    peer(met[0], 0.01).join(5)


def test_one_lane_that_fails_does_not_keep_the_peer_waiting_in_the_others(
    nccl: FakeNccl, monkeypatch: pytest.MonkeyPatch
) -> None:
    init, first = nccl.init, threading.Event()

    def failing(ranks: int, rank: int, unique_id: bytes, config: object) -> FakeComm:
        made = init(ranks, rank, unique_id, config)
        if rank == 0 and not first.is_set():
            first.set()
            made.abort()
            raise RuntimeError("out of memory")
        return made

    monkeypatch.setattr(nccl, "init", failing)
    with pytest.raises(TransferError, match="out of memory"):
        Communicator(Meets(lambda group_id: peer(group_id).name), NO_DEVICE, LANES, lambda: None, soon())


def test_settling_gives_up_at_its_deadline(nccl: FakeNccl) -> None:
    group_id = nccl.get_unique_id()
    joining.come_and_leave(Meeting(0, 2, 1, group_id), NO_DEVICE, Tuning(lanes=1))
    assert not joining.settle(Deadline.after(0.01, "test"))
    nccl.init(2, 1, group_id, {}).abort()
