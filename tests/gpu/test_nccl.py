"""The nccl transport between two processes on two GPUs."""

from __future__ import annotations

import base64
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch with CUDA")
if torch.cuda.device_count() < 2:
    pytest.skip("needs two CUDA devices", allow_module_level=True)

from tests.gpu.nccl_peer import REGIONS, digest, make_pool  # noqa: E402
from vllm_fleet.core.deadline import Deadline  # noqa: E402
from vllm_fleet.core.errors import DeadlineExceeded, LinkError, PeerGone  # noqa: E402
from vllm_fleet.fabric.contract import KVPool, Link, TransferCancelledError, TransferError  # noqa: E402
from vllm_fleet.fabric.endpoint import Endpoint  # noqa: E402
from vllm_fleet.fabric.plan import BlockCopyPlan, BlockShape, plan_blocks  # noqa: E402
from vllm_fleet.fabric.transports.cuda.nccl_tuning import Tuning  # noqa: E402
from vllm_fleet.fabric.transports.nccl import NcclTransport  # noqa: E402
from vllm_fleet.net import sockets  # noqa: E402
from vllm_fleet.net.channel import Credentials  # noqa: E402
from vllm_fleet.wire.fabric import PoolHandle  # noqa: E402

ROOT = Path(__file__).parents[2]
TOKEN = bytes(32)
SMALL = (50_000, 64)  # blocks, bytes of each
LARGE = (64, 4 << 20)
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(60)]


def soon(seconds: float = 20.0) -> Deadline:
    return Deadline.after(seconds, "test")


class Peer:
    """An nccl_peer process on GPU 1."""

    def __init__(
        self, shape: tuple[int, int], seed: int = 1, token: bytes = TOKEN, port: int = 0, gpu: int = 1
    ) -> None:
        argv = [*map(str, (gpu, *shape, seed)), token.hex(), str(port)]
        command = [sys.executable, "-m", "tests.gpu.nccl_peer", *argv]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.shape = shape
        encoded, port_text = self.read().split()
        self.handle, self.port = self.decode(encoded), int(port_text)
        self.tensors = make_pool(0, *shape, seed)[1]

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def ask(self, question: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()
        return self.read().strip()

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)

    def close(self) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGCONT)
            self.kill()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()

    @staticmethod
    def decode(text: str) -> PoolHandle:
        return msgspec.msgpack.decode(base64.b64decode(text), type=PoolHandle)


class Reader:
    """This process's side, on GPU 0: a pool of zeros."""

    def __init__(self, shape: tuple[int, int], token: bytes = TOKEN) -> None:
        self.endpoint = Endpoint(sockets.listen("127.0.0.1", 0, setting="test"), Credentials("test", token))
        self.transport = NcclTransport(self.endpoint)
        self.pool, self.tensors = make_pool(0, *shape, None)
        self.transport.register(self.pool)
        self.endpoint.start()
        self.shapes = [BlockShape(shape[1], shape[1], shape[0])] * REGIONS

    def connect(self, peer: Peer) -> Link:
        return self.transport.connect(peer.handle, soon())

    def plan(self, sources: list[int], targets: list[int], grant: str = "grant") -> BlockCopyPlan:
        return plan_blocks(self.shapes, sources, targets, grant)

    def fill(self, value: int) -> None:
        for tensor in self.tensors:
            tensor.fill_(value)
        torch.cuda.synchronize(0)

    def close(self) -> None:
        self.transport.close()
        self.endpoint.close()


@pytest.fixture(scope="module")
def peers() -> Iterator[dict[tuple[int, int], Peer]]:
    """Peers that outlive a test: starting one takes seconds."""
    started = {shape: Peer(shape) for shape in (SMALL, LARGE)}
    yield started
    for peer in started.values():
        peer.close()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as held:
        yield held


def reader_of(stack: ExitStack, shape: tuple[int, int]) -> Reader:
    reader = Reader(shape)
    stack.callback(reader.close)
    return reader


def mine(stack: ExitStack, shape: tuple[int, int], **options: Any) -> Peer:
    """A peer that the test may kill."""
    peer = Peer(shape, **options)
    stack.callback(peer.close)
    return peer


def check(peer: Peer, reader: Reader, sources: list[int], targets: list[int]) -> None:
    for ours, theirs in zip(reader.tensors, peer.tensors, strict=True):
        assert bool((ours[targets] == theirs[sources]).all())
        untouched = np.setdiff1d(np.arange(peer.shape[0]), targets)
        assert not bool(ours[untouched.tolist()].any()), "bytes outside the plan were written"


@pytest.mark.parametrize("count", [0, 1, 2, 63])
def test_scattered_blocks_arrive_and_nothing_else_changes(stack: ExitStack, peers: Any, count: int) -> None:
    peer, reader = peers[LARGE], reader_of(stack, LARGE)
    rng = np.random.default_rng(count)
    sources, targets = rng.permutation(64)[:count].tolist(), rng.permutation(64)[:count].tolist()
    link, plan = reader.connect(peer), reader.plan(sources, targets)
    for prepared in (False, True):
        if prepared:
            reader.fill(0)
            link.prepare(plan)
        transfer = link.read(plan)
        transfer.wait(soon())
        assert transfer.done()
        check(peer, reader, sources, targets)


def test_a_hundred_thousand_blocks_there_and_back(stack: ExitStack, peers: Any) -> None:
    peer, reader = peers[SMALL], reader_of(stack, SMALL)
    rng = np.random.default_rng(0)
    sources, targets = rng.permutation(SMALL[0]).tolist(), rng.permutation(SMALL[0]).tolist()
    link = reader.connect(peer)
    link.read(reader.plan(sources, targets)).wait(soon())
    check(peer, reader, sources, targets)
    before = peer.ask("digest")
    link.write(reader.plan(targets, sources)).wait(soon())
    assert peer.ask("digest") == before == digest(peer.tensors), "what was read was not what came back"


def test_a_write_arrives_and_needs_a_grant(stack: ExitStack, peers: Any) -> None:
    reader = reader_of(stack, (16, 1000))
    peer = mine(stack, (16, 1000))
    reader.fill(7)
    link = reader.connect(peer)
    link.write(reader.plan([1, 5, 9], [2, 3, 12])).wait(soon())
    for tensor in peer.tensors:
        tensor[[2, 3, 12]] = 7
    assert peer.ask("digest") == digest(peer.tensors)
    with pytest.raises(TransferError, match="not_granted"):
        link.write(reader.plan([1], [1], grant="another")).wait(soon())
    assert peer.ask("digest") == digest(peer.tensors)
    link.read(reader.plan([0], [0])).wait(soon())
    assert peer.ask("sessions") == "1", "a refusal must not cost the communicator"


def test_transfers_on_one_link_and_on_several(stack: ExitStack, peers: Any) -> None:
    peer, reader = peers[LARGE], reader_of(stack, LARGE)
    links = [reader.connect(peer) for _ in range(3)]
    transfers = [links[i % 3].read(reader.plan([i], [63 - i])) for i in range(60)]
    for transfer in transfers:
        transfer.wait(soon())
    check(peer, reader, list(range(60)), [63 - i for i in range(60)])


def test_a_killed_peer_then_one_restarted_on_its_port(stack: ExitStack) -> None:
    peer, reader = mine(stack, (64, 4096)), reader_of(stack, (64, 4096))
    link = reader.connect(peer)
    peer.kill()
    with pytest.raises(PeerGone):
        link.read(reader.plan([1], [1])).wait(soon())
    again = mine(stack, (64, 4096), seed=2, port=peer.port)
    with pytest.raises(PeerGone):
        link.read(reader.plan([1], [1])).wait(soon())
    with pytest.raises(LinkError, match=r"stale|withdrawn"):
        reader.connect(peer)
    reader.connect(again).read(reader.plan([1], [1])).wait(soon())
    check(again, reader, [1], [1])


def test_a_peer_killed_in_the_middle(stack: ExitStack) -> None:
    peer, reader = mine(stack, LARGE), reader_of(stack, LARGE)
    link = reader.connect(peer)
    blocks = list(range(64))
    mixed = blocks[::-1]
    transfers = [link.read(reader.plan(blocks, mixed)) for _ in range(200)]
    transfers[0].wait(soon())
    peer.kill()
    ended = [_ended(transfer) for transfer in transfers]
    assert "done" in ended
    assert "failed" in ended
    reader.fill(7)
    time.sleep(0.3)
    assert all(bool((tensor == 7).all()) for tensor in reader.tensors), "bytes were written after the failure"
    with pytest.raises(LinkError):
        reader.connect(peer)


def _ended(transfer: Any) -> str:
    try:
        transfer.wait(soon())
    except PeerGone:
        return "failed"
    return "done"


def _until(true: Any) -> None:
    deadline = soon()
    while not true():
        deadline.check("the test", "waiting")
        time.sleep(0.02)


def test_cancel_stops_writing(stack: ExitStack, peers: Any) -> None:
    peer, reader = peers[LARGE], reader_of(stack, LARGE)
    link = reader.connect(peer)
    blocks = list(range(64))
    first, second = (link.read(reader.plan(blocks, blocks[::-1])) for _ in range(2))
    time.sleep(0.001)
    second.cancel()
    first.cancel()
    reader.fill(7)
    time.sleep(0.2)
    assert all(bool((tensor == 7).all()) for tensor in reader.tensors)
    for transfer in (second, first):
        try:
            transfer.done()
        except TransferCancelledError:
            continue
    link.read(reader.plan([0], [0])).wait(soon())


def test_memory_registered_again_and_its_old_handle(stack: ExitStack) -> None:
    peer, reader = mine(stack, (64, 4096)), reader_of(stack, (64, 4096))
    link = reader.connect(peer)
    former = peer.handle
    peer.handle = peer.decode(peer.ask("register"))
    with pytest.raises(PeerGone):
        link.read(reader.plan([1], [1])).wait(soon())
    reader.connect(peer).read(reader.plan([1], [1])).wait(soon())
    check(peer, reader, [1], [1])
    with pytest.raises(LinkError):
        reader.transport.connect(former, soon())


def test_what_cannot_be_linked(stack: ExitStack, peers: Any) -> None:
    peer, reader = peers[LARGE], reader_of(stack, LARGE)
    stranger = Reader(LARGE, token=bytes(31) + b"x")
    stack.callback(stranger.close)
    with pytest.raises(LinkError, match="token"):
        stranger.connect(peer)
    with pytest.raises(LinkError, match="same GPU"):
        reader.transport.connect(msgspec.structs.replace(reader.transport.register(reader.pool)), soon())
    with pytest.raises(LinkError, match="CUDA memory only"):
        reader.transport.register(KVPool(()))
    for details in (b"", b"\xc1", b"\x80" * 50):
        with pytest.raises(LinkError):
            reader.transport.connect(msgspec.structs.replace(peer.handle, details=details), soon())


def test_host_staging_there_and_back() -> None:
    from vllm_fleet.fabric.transports.cuda.staging import HostReader, HostWriter

    (source, sources), (target, targets) = make_pool(0, 300, 40_000, 3), make_pool(0, 300, 40_000, None)
    order = np.random.default_rng(0).permutation(300)
    address = np.array([region.address for region in source.regions for _ in order]) + np.tile(order, REGIONS) * 40_000
    back = np.array([region.address for region in target.regions for _ in order]) + np.tile(order, REGIONS) * 40_000
    nbytes = np.full(len(address), 40_000, np.int64)
    reader, writer = HostReader(0, chunk_bytes=1 << 20), HostWriter(0, chunk_bytes=1 << 20)
    for _ in range(2):
        writer.begin(back, nbytes)
        for chunk in reader.chunks(address, nbytes):
            while chunk:  # in odd sizes, as a socket gives them
                into = writer.buffer()
                took = min(len(into), len(chunk), 300_001)
                into[:took] = chunk[:took]
                writer.commit(took)
                chunk = chunk[took:]
        assert writer.is_full()
        writer.finish()
        torch.cuda.synchronize(0)
        assert all(bool((a == b).all()) for a, b in zip(sources, targets, strict=True))
        for tensor in targets:
            tensor.zero_()
        torch.cuda.synchronize(0)
    reader.close()
    writer.close()


def test_threads_and_files_end_with_their_links(stack: ExitStack, peers: Any) -> None:
    def use() -> None:
        reader = Reader(LARGE)
        reader.connect(peers[LARGE]).read(reader.plan([1], [1])).wait(soon())
        reader.close()

    threads = threading.active_count()
    use()  # NCCL keeps what it opens for the first communicator of a process
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        use()
    _until(lambda: threading.active_count() <= threads)
    _until(lambda: len(os.listdir("/proc/self/fd")) <= files)
    _until(lambda: peers[LARGE].ask("sessions") == "0")


def test_cancels_while_the_link_meets_again_leave_no_files(stack: ExitStack, peers: Any) -> None:
    """NCCL's listening sockets for ids that nobody joined any more were left by each."""
    peer, reader = peers[LARGE], reader_of(stack, LARGE)
    link = reader.connect(peer)
    files, theirs = (len(os.listdir(f"/proc/{pid}/fd")) for pid in ("self", peer.process.pid))
    for pause_s in (0.0, 0.005, 0.05, 0.2, 0.4, 0.01, 0.1, 0.3):
        transfer = link.read(reader.plan([1], [1]))
        time.sleep(pause_s)  # at another point of forming the communicators each time
        transfer.cancel()
        link._copier.interrupt()  # type: ignore[attr-defined] # so that the next one forms them anew, even if this was done
    link.read(reader.plan([1], [1])).wait(soon())
    _until(lambda: len(os.listdir("/proc/self/fd")) <= files)
    _until(lambda: len(os.listdir(f"/proc/{peer.process.pid}/fd")) <= theirs)


@pytest.mark.parametrize(
    "options",
    [
        {"chunk_bytes": 31 << 20, "buffers": 2, "lanes": 1, "ctas_max": 32},
        {"uploaded": True, "programs": 64},
        {"registered": True},
        {"chunk_bytes": 20 << 20, "buffers": 3, "lanes": 2},
    ],
    ids=str,
)
def test_every_way_to_stage(stack: ExitStack, peers: Any, options: dict[str, Any]) -> None:
    peer, reader = peers[LARGE], reader_of(stack, LARGE)
    other = NcclTransport(reader.endpoint, Tuning(**options))
    stack.callback(other.close)
    other.register(reader.pool)
    link = other.connect(peer.handle, soon())
    blocks = list(range(64))
    for _ in range(3):
        reader.fill(0)
        link.read(reader.plan(blocks, blocks[::-1])).wait(soon())
        check(peer, reader, blocks, blocks[::-1])


def test_a_stopped_peer_meets_the_deadline_and_the_link_recovers(stack: ExitStack) -> None:
    peer, reader = mine(stack, LARGE), reader_of(stack, LARGE)
    link = reader.connect(peer)
    blocks = list(range(64))
    transfers = [link.read(reader.plan(blocks, blocks[::-1])) for _ in range(200)]
    transfers[0].wait(soon())
    peer.signal(signal.SIGSTOP)
    late = None
    for transfer in transfers[1:]:
        try:
            transfer.wait(Deadline.after(1.0, "test"))
        except DeadlineExceeded:
            late = transfer
            break
    assert late is not None
    for transfer in reversed(transfers):  # those that have not begun first
        transfer.cancel()
    reader.fill(7)
    peer.signal(signal.SIGCONT)
    time.sleep(0.5)
    assert all(bool((tensor == 7).all()) for tensor in reader.tensors), "bytes were written after the deadline"
    link.read(reader.plan(blocks, blocks[::-1])).wait(soon())
    check(peer, reader, blocks, blocks[::-1])
    _until(lambda: peer.ask("sessions") == "1")
