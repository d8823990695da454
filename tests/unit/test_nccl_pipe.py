"""Flow control of the nccl pipe: streams, events, kernels and NCCL are faked, and run in any order CUDA may choose.

What is on its way is read, and what arrives is written, as late as the streams allow, with rubbish in between: a
staging buffer or a table that is used again too early shows as wrong bytes.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")
import torch

from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import DeadlineExceeded
from vllm_fleet.fabric.contract import TransferCancelledError
from vllm_fleet.fabric.transports.cuda import pipe as pipe_module
from vllm_fleet.fabric.transports.cuda.nccl_pieces import lead_and_rest, message_sizes
from vllm_fleet.fabric.transports.cuda.nccl_tuning import TABLES, Tuning
from vllm_fleet.fabric.transports.cuda.pipe import Pipe

BLOCK, CHUNK = 96, 1024
Ready = Callable[[], bool]


class World:
    """Streams of operations, each with a condition; step() carries out the first of any stream where it holds."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.streams: dict[int, deque[tuple[Ready, Callable[[], object]]]] = defaultdict(deque)
        self.numbers = itertools.count(1)
        self.arrived: dict[int, deque[bytes]] = defaultdict(deque)
        """What each lane carries."""
        self.cut = False
        self.given_back = 0
        """Streams and events closed."""
        self.lock = threading.RLock()

    def put(self, stream: int, work: Callable[[], object], ready: Ready = lambda: True) -> None:
        with self.lock:
            self.streams[stream].append((ready, work))

    def step(self) -> None:
        with self.lock:
            able = [queue for queue in self.streams.values() if queue and queue[0][0]()]
            if able:
                able[int(self.rng.integers(len(able)))].popleft()[1]()

    def run(self, stream: int) -> None:
        while self.streams[stream]:
            self.step()

    def fakes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        world = self

        class Stream:
            def __init__(self, raw: int) -> None:
                self.cuda_stream = raw

            def synchronize(self) -> None:
                world.run(self.cuda_stream)

            def close(self) -> None:
                assert not world.streams[self.cuda_stream]
                world.given_back += 1

        class Point:
            def __init__(self, device: int) -> None:
                self.mark = [True]

            def record(self, stream: int) -> None:
                mark = self.mark = [False]
                world.put(stream, lambda: mark.__setitem__(0, True))

            def hold(self, stream: int) -> None:
                mark = self.mark
                world.put(stream, lambda: None, lambda: mark[0])

            def passed(self) -> bool:
                for _ in range(2):
                    world.step()
                return self.mark[0]

            def close(self) -> None:
                world.given_back += 1

        def is_quiet(stream: int) -> bool:
            world.step()
            return not world.streams[stream]

        class Kernel:
            def __init__(self, *_: object) -> None:
                pass

            def __call__(self, grid: int, stream: int, arguments: tuple[int, int]) -> None:
                table, count = arguments
                assert grid >= 1

                def copy() -> None:
                    rows = np.frombuffer(ctypes.string_at(table, count * 32), np.int64).reshape(-1, 4)
                    for source, target, nbytes, _ in rows.tolist():
                        ctypes.memmove(target, source, nbytes)

                world.put(stream, copy)

        class Pinned:
            def __init__(self, device: int, nbytes: int) -> None:
                self.words = np.zeros(nbytes // 8, np.int64)
                self.address = int(self.words.ctypes.data)

            def close(self) -> None:
                pass

        on_device: dict[int, Any] = {}

        def allocate(device: int, nbytes: int) -> int:
            words = np.zeros(nbytes // 8, np.int64)
            on_device[int(words.ctypes.data)] = words
            return int(words.ctypes.data)

        def copy_in(address: int, content: int, nbytes: int, stream: int) -> None:
            world.put(stream, lambda: ctypes.memmove(address, content, nbytes))

        driver = SimpleNamespace(Pinned=Pinned, Stream=lambda device: Stream(next(world.numbers)))
        driver.allocate, driver.copy_in, driver.free = allocate, copy_in, lambda device, address: on_device.pop(address)
        cuda = SimpleNamespace(current_stream=lambda device: Stream(0))
        faked = SimpleNamespace(cuda=cuda, uint8=torch.uint8, device=lambda *_: "cpu", empty=torch.empty)
        fakes = {"driver": driver, "torch": faked, "Kernel": Kernel, "Point": Point, "is_quiet": is_quiet}
        for name, fake in fakes.items():
            monkeypatch.setattr(pipe_module, name, fake)
        monkeypatch.setattr(pipe_module, "TABLE_ROWS", 16)
        monkeypatch.setattr(pipe_module, "IDLE_S", 2.0)
        self.on_device = on_device


class FakeCommunicator:
    def __init__(self, world: World, lanes: int) -> None:
        self._world, self.lanes = world, lanes
        self.registered: list[tuple[int, int]] = []
        self.aborted = False

    def send(self, address: int, nbytes: int, stream: int, lane: int) -> None:
        arrived = self._world.arrived[lane]
        self._world.put(stream, lambda: None)
        self._world.put(
            stream,
            lambda: arrived.append(ctypes.string_at(address, nbytes)),
            lambda: self.aborted or (len(arrived) < 2 and not self._world.cut),
        )

    def receive(self, address: int, nbytes: int, stream: int, lane: int) -> None:
        arrived = self._world.arrived[lane]

        def finish() -> None:
            if not self.aborted:
                content = arrived.popleft()
                assert len(content) == nbytes
                ctypes.memmove(address, content, nbytes)

        self._world.put(stream, lambda: ctypes.memset(address, 0xEE, nbytes))
        self._world.put(stream, finish, lambda: self.aborted or bool(arrived))

    def register(self, address: int, nbytes: int) -> None:
        self.registered.append((address, nbytes))

    def check(self) -> None:
        pass

    def abort(self) -> None:
        self.aborted = True


class Ends:
    """A sending and a receiving pipe, each with a pool of scattered blocks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int, tuning: Tuning) -> None:
        self.world = World(seed)
        self.world.fakes(monkeypatch)
        self.comms = [FakeCommunicator(self.world, tuning.lanes) for _ in range(2)]
        self.sender, self.receiver = (Pipe(comm, 0, tuning) for comm in self.comms)  # type: ignore[arg-type]
        self.source = self.world.rng.integers(0, 256, (400, BLOCK), np.uint8)
        self.target = np.zeros_like(self.source)

    def pieces(self, pool: np.ndarray, blocks: np.ndarray) -> list[Any]:
        nbytes = np.full(len(blocks), BLOCK, np.int64)
        sizes = message_sizes(int(nbytes.sum()), CHUNK)
        return list(lead_and_rest(int(pool.ctypes.data) + blocks * BLOCK, nbytes, sizes, 64))


def whole(pipe: Pipe, move: Callable[[Any, Callable[[], None]], None], parts: list[Any]) -> None:
    for part in parts:
        move(part, lambda: None)
    pipe.drain(lambda: None)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("buffers", "lanes", "uploaded"), [(2, 1, False), (3, 2, True), (4, 2, False), (5, 3, True)])
def test_every_byte_arrives_in_any_order_of_the_streams(
    monkeypatch: pytest.MonkeyPatch, seed: int, buffers: int, lanes: int, uploaded: bool
) -> None:
    ends = Ends(monkeypatch, seed, Tuning(CHUNK, buffers, lanes=lanes, programs=4, uploaded=uploaded))
    for _ in range(3):  # transfers that follow one another reuse buffers, tables and events
        ends.target[:] = 0
        order = ends.world.rng.permutation(400).astype(np.int64)[:150]
        places = ends.world.rng.permutation(400).astype(np.int64)[:150]

        with ThreadPoolExecutor() as other:
            received = other.submit(whole, ends.receiver, ends.receiver.receive, ends.pieces(ends.target, places))
            for part in ends.pieces(ends.source, order):
                ends.sender.send(part, lambda: None)
            ends.sender.await_copies(lambda: None)
            before = ends.source.copy()
            ends.source[:] = ends.world.rng.integers(0, 256, ends.source.shape, np.uint8)  # nobody reads it any more
            ends.sender.drain(lambda: None)
            received.result(5)
        assert (ends.target[places] == before[order]).all()
        assert not np.delete(ends.target, places, axis=0).any()
    for pipe in (ends.sender, ends.receiver):
        pipe.abort()
        pipe.abort()
    assert not ends.world.on_device
    assert ends.world.given_back == 2 * (1 + lanes + buffers + pipe_module.AHEAD_MAX + TABLES)


def test_nothing_is_written_after_an_abort(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = Ends(monkeypatch, 1, Tuning(CHUNK, 3, lanes=2))
    blocks = np.arange(0, 36, 2, dtype=np.int64)
    for part in ends.pieces(ends.target, blocks):
        ends.receiver.receive(part, lambda: None)
    looked = 0

    def watch() -> None:
        nonlocal looked
        looked += 1
        if looked > 20:
            raise TransferCancelledError("cancelled")

    with pytest.raises(TransferCancelledError):
        ends.receiver.drain(watch)
    ends.receiver.abort()
    after = ends.target.copy()
    for _ in range(1000):
        ends.world.step()
    assert (ends.target == after).all()


def test_a_peer_that_stops_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = Ends(monkeypatch, 2, Tuning(CHUNK, 3, lanes=2))
    monkeypatch.setattr(pipe_module, "IDLE_S", 0.02)
    ends.world.cut = True
    for part in ends.pieces(ends.source, np.arange(20, dtype=np.int64)):
        ends.sender.send(part, lambda: None)
    with pytest.raises(DeadlineExceeded, match="IDLE_S"):
        ends.sender.drain(lambda: None)
    ends.sender.abort()


def test_registered_staging_is_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = Ends(monkeypatch, 3, Tuning(CHUNK, 3, registered=True))
    assert [nbytes for _, nbytes in ends.comms[0].registered] == [3 * CHUNK]


def test_a_wait_looks_all_the_time_only_near_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_fleet.fabric.transports.cuda import joining

    clock, pauses = [100.0], []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(joining, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    joining.poll(lambda: clock[0] >= 100.0102, lambda: None, Deadline.after(5, "test"), "peer", "moving", 0.01)
    far = [pause for pause in pauses if pause == joining.NAP_S]
    assert 45 <= len(far) <= 50
    assert pauses[: len(far)] == far
    assert set(pauses[len(far) :]) == {joining.LOOK_S}


def test_short_sleeps_are_short_only_inside_a_wait() -> None:
    from vllm_fleet.fabric.transports.cuda import joining

    libc = ctypes.CDLL(None)
    before = libc.prctl(30)  # PR_GET_TIMERSLACK
    seen: list[int] = []

    def done() -> bool:
        seen.append(libc.prctl(30))
        return True

    joining.poll(done, lambda: None, Deadline.after(5, "test"), "peer", "moving")
    assert seen == [1]
    assert libc.prctl(30) == before
