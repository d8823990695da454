"""Both ends of the nccl transport's conversation over real connections; only GPU and NCCL are replaced, by queues."""

from __future__ import annotations

import ctypes
import queue
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from unittest.mock import Mock

import numpy as np
import pytest

from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import BadRequest, DeadlineExceeded, FleetError, LinkError, PeerGone
from vllm_fleet.fabric import transports
from vllm_fleet.fabric.contract import KVPool, Region, TransferCancelledError, TransferError
from vllm_fleet.fabric.endpoint import Endpoint, ask, receive_answer
from vllm_fleet.fabric.owner import OwnedPool, encode_runs
from vllm_fleet.fabric.plan import BlockCopyPlan, BlockShape, plan_blocks
from vllm_fleet.fabric.rendezvous import Meeting, Rendezvous
from vllm_fleet.net import sockets
from vllm_fleet.net.channel import Channel, Credentials, connect
from vllm_fleet.wire import fabric as wire
from vllm_fleet.wire.fabric import PoolHandle

pytest.importorskip("torch")
pytest.importorskip("triton")
from vllm_fleet.fabric.transports.cuda import nccl_copier, nccl_owner, nccl_questions
from vllm_fleet.fabric.transports.cuda.nccl_copier import NcclCopier, NcclDetails
from vllm_fleet.fabric.transports.cuda.nccl_link import NcclLink, Stop
from vllm_fleet.fabric.transports.cuda.nccl_tuning import Tuning
from vllm_fleet.fabric.transports.cuda.pieces import Pieces

BLOCKS, BLOCK_BYTES, REGIONS = 64, 512, 2
SECRET = Credentials("test", bytes(32))
NO_DEVICE = -1  # torch.cuda.device(-1) does nothing, also where there is no CUDA

wires: dict[bytes, dict[int, queue.SimpleQueue[bytes]]] = defaultdict(lambda: defaultdict(queue.SimpleQueue))
"""What goes to each rank of each communicator."""


class FakeCommunicator:
    """Meets as the real one does, then moves bytes through a queue."""

    made = 0

    def __init__(
        self, rendezvous: Rendezvous, device: int, tuning: Tuning, watch: Callable[[], None], deadline: Deadline
    ) -> None:
        FakeCommunicator.made += 1
        number = FakeCommunicator.made.to_bytes(128)
        self.meeting = rendezvous.meet(lambda: number, deadline)
        while not rendezvous.joined(self.meeting):
            watch()
            deadline.check("the peer", "joining")
            time.sleep(0.001)
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True


class FakePipe:
    """The Pipe's interface on CPU memory."""

    held_up = threading.Event()
    """While set, nothing arrives."""

    def __init__(self, communicator: FakeCommunicator, device: int, tuning: Tuning) -> None:
        self.communicator = communicator
        ways = wires[communicator.meeting.group_id]
        self.out, self.into = ways[1 - communicator.meeting.rank], ways[communicator.meeting.rank]

    def send(self, pieces: Pieces, watch: Callable[[], None]) -> None:
        for piece in (pieces[index] for index in range(len(pieces))):
            runs = zip(piece.address.tolist(), piece.nbytes.tolist(), strict=True)
            self.out.put(b"".join(ctypes.string_at(address, size) for address, size in runs))

    def receive(self, pieces: Pieces, watch: Callable[[], None]) -> None:
        for piece in (pieces[index] for index in range(len(pieces))):
            content = self._take(piece.total_bytes, watch)
            for address, within, size in zip(piece.address, piece.within, piece.nbytes, strict=True):
                ctypes.memmove(int(address), content[int(within) : int(within + size)], int(size))

    def exchange(self, pattern: bytes, watch: Callable[[], None]) -> bytes:
        self.out.put(pattern)
        return self._take(len(pattern), watch)

    def _take(self, nbytes: int, watch: Callable[[], None]) -> bytes:
        while True:
            watch()
            try:
                if not self.held_up.is_set():
                    content = self.into.get(timeout=0.01)
                    assert len(content) == nbytes
                    return content
            except queue.Empty:
                pass

    def drain(self, watch: Callable[[], None]) -> None:
        watch()

    await_copies = drain

    def abort(self) -> None:
        self.communicator.abort()


def make_pool(seed: int | None) -> tuple[KVPool, list[np.ndarray]]:
    """A pool of random bytes, or (None) of zeros."""
    rng = np.random.default_rng(seed)
    shape = (BLOCKS, BLOCK_BYTES)
    arrays = [
        np.zeros(shape, np.uint8) if seed is None else rng.integers(0, 256, shape, np.uint8) for _ in range(REGIONS)
    ]
    regions = tuple(Region(int(a.ctypes.data), a.nbytes, BLOCK_BYTES, BLOCK_BYTES, BLOCKS) for a in arrays)
    return KVPool(regions, owner=arrays, cuda=NO_DEVICE), arrays


class Both:
    """An owner that serves a pool of random bytes, and an asker with a pool of zeros."""

    def __init__(self) -> None:
        self.endpoint = Endpoint(sockets.listen("127.0.0.1", 0, setting="test"), SECRET)
        self.owned = OwnedPool(self.endpoint)
        self.owner = nccl_owner.NcclOwner(self.endpoint, self.owned, Tuning(chunk_bytes=4096))
        self.pool, self.theirs = make_pool(1)
        self.handle = PoolHandle("nccl", self.owned.register(self.pool), self.pool.sizes)
        self.endpoint.start()
        own, self.ours = make_pool(None)
        details = NcclDetails("127.0.0.1", self.endpoint.port, bytes(16))
        self.copier = NcclCopier(details, self.handle, own, SECRET, Tuning(chunk_bytes=4096))
        self.cancelled = Stop()

    def connect(self) -> Channel:
        return connect("127.0.0.1", self.endpoint.port, SECRET, Deadline.after(5, "test"))

    def open(self) -> None:
        soon = Deadline.after(5, "test")
        self.copier.open(lambda: None, soon, soon)

    def plan(self, sources: list[int], targets: list[int]) -> BlockCopyPlan:
        return plan_blocks([BlockShape(BLOCK_BYTES, BLOCK_BYTES, BLOCKS)] * REGIONS, sources, targets, "grant")

    def until_no_session(self) -> None:
        until = time.monotonic() + 5
        while self.owner.sessions and time.monotonic() < until:
            time.sleep(0.005)
        assert self.owner.sessions == 0

    def close(self) -> None:
        self.copier.close()
        self.endpoint.close()
        self.until_no_session()


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Iterator[Both]:
    for module in (nccl_copier, nccl_owner):
        monkeypatch.setattr(module, "Communicator", FakeCommunicator)
        monkeypatch.setattr(module, "Pipe", FakePipe)
    monkeypatch.setattr(nccl_questions, "PART_RUNS_MAX", 10)
    FakePipe.held_up.clear()
    pair = Both()
    yield pair
    pair.close()


SOURCES, TARGETS = list(range(0, 60, 2)), list(range(59, 0, -2))


def test_a_read_of_several_questions(both: Both) -> None:
    both.open()
    both.copier.read(both.plan(SOURCES, TARGETS), both.cancelled)
    for ours, theirs in zip(both.ours, both.theirs, strict=True):
        assert (ours[TARGETS] == theirs[SOURCES]).all()
        assert not np.delete(ours, TARGETS, axis=0).any()


@pytest.mark.parametrize("blocks", [1, 30])
def test_a_prepared_read_is_as_any_other(both: Both, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    both.open()
    plan = both.plan(SOURCES[:blocks], TARGETS[:blocks])
    both.copier.prepare(plan)
    questions = Mock(side_effect=AssertionError("the question was made once more"))
    with monkeypatch.context() as patched:
        patched.setattr(nccl_copier, "Questions", questions)
        both.copier.read(plan, both.cancelled)
    for ours, theirs in zip(both.ours, both.theirs, strict=True):
        assert (ours[TARGETS[:blocks]] == theirs[SOURCES[:blocks]]).all()
        ours[:] = 0
    both.copier.read(plan, both.cancelled)  # no more than one read uses it
    assert (both.ours[0][TARGETS[:blocks]] == both.theirs[0][SOURCES[:blocks]]).all()


def test_few_plans_are_held_and_only_for_reads(both: Both) -> None:
    both.open()
    plans = [both.plan([number], [number]) for number in range(nccl_copier.PREPARED_MAX + 2)]
    for plan in plans:
        both.copier.prepare(plan)
    assert [one.given for one in both.copier._prepared.values()] == plans[2:]
    both.copier.prepare(both.plan([], []))
    outside = both.plan([1], [1])
    both.copier.prepare(
        BlockCopyPlan("grant", outside.region, outside.source + (1 << 40), outside.target, outside.nbytes)
    )
    assert len(both.copier._prepared) == nccl_copier.PREPARED_MAX
    both.endpoint.allow_write = lambda grant, regions, offsets, nbytes: True
    both.ours[0][plans[-1].target[0] // BLOCK_BYTES] = 7
    both.copier.write(plans[-1], both.cancelled)
    assert (both.theirs[0][plans[-1].target[0] // BLOCK_BYTES] == 7).all()


def test_a_plan_outside_the_memory_costs_no_connection(both: Both) -> None:
    both.open()
    channel = both.copier._channel
    inside = both.plan([1], [1])
    for source, target in ((1 << 40, 0), (0, 1 << 40), (-(1 << 20), 0)):
        outside = BlockCopyPlan("grant", inside.region, inside.source + source, inside.target + target, inside.nbytes)
        with pytest.raises(TransferError, match="outside"):
            both.copier.read(outside, both.cancelled)
    both.copier.read(inside, both.cancelled)
    assert both.copier._channel is channel


def test_a_write_needs_a_grant(both: Both) -> None:
    both.open()
    for array in both.ours:
        array[:] = np.random.default_rng(5).integers(0, 256, array.shape, np.uint8)
    before = [array.copy() for array in both.theirs]
    made = FakeCommunicator.made
    with pytest.raises(TransferError, match="not_granted"):
        both.copier.write(both.plan(SOURCES, TARGETS), both.cancelled)
    assert all((now == then).all() for now, then in zip(both.theirs, before, strict=True))
    both.endpoint.allow_write = lambda grant, regions, offsets, nbytes: grant == "grant"
    both.copier.write(both.plan(SOURCES, TARGETS), both.cancelled)
    assert all((theirs[TARGETS] == ours[SOURCES]).all() for ours, theirs in zip(both.ours, both.theirs, strict=True))
    assert FakeCommunicator.made == made, "a refusal must not cost the communicator"


def test_a_grant_that_ends_in_the_middle(both: Both) -> None:
    both.open()
    asked: list[int] = []
    both.endpoint.allow_read = lambda grant, regions, offsets, nbytes: not asked.append(len(nbytes)) and len(asked) < 2  # type: ignore[func-returns-value]
    with pytest.raises(TransferError, match="not_granted"):
        both.copier.read(both.plan(SOURCES, TARGETS), both.cancelled)
    assert asked == [10, 10]
    both.endpoint.allow_read = lambda grant, regions, offsets, nbytes: True
    both.copier.read(both.plan([1], [1]), both.cancelled)  # over a new communicator
    assert (both.ours[0][1] == both.theirs[0][1]).all()


def test_a_stale_handle(both: Both) -> None:
    both.open()
    both.owned.register(both.pool)
    with pytest.raises(TransferError, match="stale_pool"):
        both.copier.read(both.plan([1], [1]), both.cancelled)
    both.copier.close()
    with pytest.raises(PeerGone, match="stale_pool"):
        both.open()
    channel = both.connect()
    assert join(both, channel, 1) == wire.Denied("stale_pool")
    channel.close()


def test_withdrawing_memory_ends_what_runs(both: Both) -> None:
    both.open()
    FakePipe.held_up.set()
    errors: list[FleetError] = []

    def read() -> None:
        try:
            both.copier.read(both.plan(SOURCES, TARGETS), both.cancelled)
        except FleetError as error:
            errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    both.owned.withdraw()
    both.owner.stop()
    reader.join(5)
    assert not reader.is_alive()
    assert isinstance(errors[0], PeerGone)


def test_cancel_ends_both_sides_and_the_next_transfer_meets_again(both: Both) -> None:
    both.open()
    FakePipe.held_up.set()

    def cancel() -> None:
        both.cancelled.set()
        both.copier.interrupt()

    threading.Timer(0.05, cancel).start()
    with pytest.raises(PeerGone):
        both.copier.read(both.plan(SOURCES, TARGETS), both.cancelled)
    both.until_no_session()
    FakePipe.held_up.clear()
    both.copier.read(both.plan([1], [2]), Stop())
    assert (both.ours[0][2] == both.theirs[0][1]).all()


def join(both: Both, channel: Channel, epoch: int, pair: str = "pair", chunk_bytes: int = 4096) -> wire.Answer:
    """The last answer to a join: to one that is not refused there are two."""
    soon = Deadline.after(5, "test")
    question = wire.NcclJoin(pair, epoch, both.handle.pool, bytes(128), chunk_bytes, 16)
    answer = ask(channel, question, soon)
    return answer if isinstance(answer, wire.Denied) else receive_answer(channel, soon)


def test_epochs_of_a_pair_only_go_up(both: Both) -> None:
    first, second, third = (both.connect() for _ in range(3))
    soon = Deadline.after(5, "test")
    assert join(both, first, 2) == wire.NcclJoined(2)
    refused = join(both, second, 2)
    assert isinstance(refused, wire.Denied)
    assert refused.reason == "already_open"
    assert join(both, third, 3) == wire.NcclJoined(3)
    with pytest.raises(PeerGone):
        receive_answer(first, soon)  # ended by the later epoch
    for channel in (first, second, third):
        channel.close()


def test_what_is_refused(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    channel, soon = both.connect(), Deadline.after(5, "test")
    one = np.array([1], np.int64)
    read = wire.NcclRead("grant", both.handle.pool, encode_runs(one * 0, one, one), False)
    asked = [ask(channel, question, soon) for question in (read, wire.NcclPing(b"x"))]
    for answer in (*asked, join(both, channel, 1, chunk_bytes=40 << 20)):
        assert isinstance(answer, wire.Denied)
        assert answer.reason == "unsupported"
    monkeypatch.setattr("vllm_fleet.core.limits.NCCL_SESSIONS_MAX", 1)
    assert join(both, channel, 1) == wire.NcclJoined(1)
    other = both.connect()
    answer = join(both, other, 1, pair="another")
    assert isinstance(answer, wire.Denied)
    assert "the most" in answer.detail
    for each in (channel, other):
        each.close()


def test_another_question_in_the_middle_ends_the_connection(both: Both) -> None:
    channel, soon = both.connect(), Deadline.after(5, "test")
    assert join(both, channel, 1) == wire.NcclJoined(1)
    one = np.array([1], np.int64)
    first = wire.NcclRead("grant", both.handle.pool, encode_runs(one * 0, one, one), True)
    assert ask(channel, first, soon) == wire.Reading(1)
    with pytest.raises(PeerGone):
        ask(channel, wire.Ping(), soon)
    channel.close()


def test_a_pool_that_nccl_cannot_move(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = Endpoint(sockets.listen("127.0.0.1", 0, setting="test"), SECRET)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    transport = transports.load("nccl")(endpoint)
    with pytest.raises(LinkError, match="CUDA memory only"):
        transport.register(KVPool(()))
    with pytest.raises(LinkError, match="torch sees none"):
        transport.register(KVPool((), cuda=0))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "nccl", None)
    monkeypatch.delitem(sys.modules, "nccl.core", raising=False)
    with pytest.raises(LinkError, match=r"pip install 'vllm-fleet\[nccl\]'"):
        transports.load("nccl")(endpoint).register(KVPool((), cuda=0))
    transport.close()
    endpoint.close()


@pytest.mark.parametrize(("chunk", "buffers"), [(1 << 20, 1), (32 << 20, 2), (16 << 20, 4)])
def test_staging_stays_under_64_mib(chunk: int, buffers: int) -> None:
    with pytest.raises(BadRequest, match="staging"):
        Tuning(chunk, buffers)


@pytest.mark.parametrize("lanes", [0, 5])
def test_lanes_are_few(lanes: int) -> None:
    with pytest.raises(BadRequest, match="lanes"):
        Tuning(lanes=lanes)


def test_an_id_of_no_whole_number_of_lanes(both: Both) -> None:
    channel, soon = both.connect(), Deadline.after(5, "test")
    answer = ask(channel, wire.NcclJoin("pair", 1, both.handle.pool, bytes(129), 4096, 16), soon)
    assert isinstance(answer, wire.Denied)
    assert answer.detail == "an id of 129 bytes"
    both.until_no_session()
    channel.close()


def test_one_question_for_too_much(both: Both) -> None:
    channel, soon = both.connect(), Deadline.after(5, "test")
    assert join(both, channel, 1) == wire.NcclJoined(1)
    many = np.zeros(REGIONS * BLOCKS * 100, np.int64)
    read = wire.NcclRead("grant", both.handle.pool, encode_runs(many, many, many + BLOCK_BYTES), False)
    answer = ask(channel, read, soon)
    assert isinstance(answer, wire.Denied)
    assert "in one question" in answer.detail
    channel.close()


def test_a_link_whose_connection_was_cut_is_made_again(both: Both) -> None:
    both.open()
    both.copier.interrupt()  # too late: nothing runs
    both.copier.read(both.plan([1], [1]), both.cancelled)
    assert (both.ours[0][1] == both.theirs[0][1]).all()


def test_a_link_whose_peer_sends_nothing_meets_the_deadline_and_recovers(both: Both) -> None:
    both.open()
    link = NcclLink("nccl", "peer", both.copier)
    FakePipe.held_up.set()
    with pytest.raises(DeadlineExceeded, match="setting: test"):
        link.read(both.plan(SOURCES, TARGETS)).wait(Deadline.after(0.05, "test"))
    both.until_no_session()
    assert not any(array.any() for array in both.ours)
    FakePipe.held_up.clear()
    link.read(both.plan(SOURCES, TARGETS)).wait(Deadline.after(5, "test"))
    assert all((ours[TARGETS] == theirs[SOURCES]).all() for ours, theirs in zip(both.ours, both.theirs, strict=True))
    link.close()


def test_cancelling_what_a_waiting_thread_carries_out(both: Both) -> None:
    both.open()
    link = NcclLink("nccl", "peer", both.copier)
    FakePipe.held_up.set()
    transfer = link.read(both.plan(SOURCES, TARGETS))
    errors: list[FleetError] = []

    def wait() -> None:
        try:
            transfer.wait(Deadline.after(5, "test"))
        except FleetError as error:
            errors.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    transfer.cancel()
    FakePipe.held_up.clear()
    waiter.join(5)
    assert isinstance(errors[0], TransferCancelledError)
    assert not any(array.any() for array in both.ours)
    link.read(both.plan([1], [2])).wait(Deadline.after(5, "test"))
    link.close()


def test_nothing_holds_a_communicator_when_the_owner_has_stopped(both: Both) -> None:
    both.open()
    (session,) = both.owner._sessions.values()
    pipe = session.pipe
    assert isinstance(pipe, FakePipe)
    both.owner.stop()
    assert pipe.communicator.aborted
    assert session.pipe is None


def test_an_owner_whose_agreement_is_not_heard_comes_and_leaves(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[Meeting] = []
    came = threading.Event()

    def come_and_leave(meeting: Meeting, device: int, tuning: Tuning) -> None:
        left.append(meeting)
        came.set()

    def unheard(channel: Channel, answer: wire.Answer) -> None:
        raise PeerGone("the connection broke")

    monkeypatch.setattr(nccl_owner, "come_and_leave", come_and_leave)
    monkeypatch.setattr(nccl_owner, "_answer", unheard)
    channel = both.connect()
    channel.send(
        wire.encode(wire.NcclJoin("pair", 1, both.handle.pool, bytes(256), 4096, 16)), Deadline.after(5, "test")
    )
    assert came.wait(5)
    assert left == [Meeting(1, 2, 1, bytes(256))]
    both.until_no_session()
    channel.close()
