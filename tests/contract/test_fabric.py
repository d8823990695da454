"""What every transport promises, tested against a peer that is a process of its own."""

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

import msgspec
import numpy as np
import pytest

from tests.contract.fabric_peer import REGIONS, make_pool
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import DeadlineExceeded, LinkError, PeerGone
from vllm_fleet.fabric import transports
from vllm_fleet.fabric.contract import KVPool, Link, TransferCancelledError, TransferError, Transport
from vllm_fleet.fabric.endpoint import Endpoint
from vllm_fleet.fabric.plan import BlockCopyPlan, BlockShape, plan_blocks
from vllm_fleet.net import sockets
from vllm_fleet.net.channel import Credentials
from vllm_fleet.wire.fabric import PoolHandle

ROOT = Path(__file__).parents[2]
TOKEN = bytes(32)
pytestmark = pytest.mark.timeout(60)


class Peer:
    """A fabric_peer process."""

    def __init__(
        self, name: str, blocks: int, block_bytes: int, seed: int, token: bytes = TOKEN, port: int = 0
    ) -> None:
        argv = [name, str(blocks), str(block_bytes), str(seed), token.hex(), str(port)]
        command = [sys.executable, "-m", "tests.contract.fabric_peer", *argv]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        encoded, port_text = self.process.stdout.readline().split()
        self.handle = msgspec.msgpack.decode(base64.b64decode(encoded), type=PoolHandle)
        self.port = int(port_text)
        self.blocks, self.block_bytes = blocks, block_bytes
        self.arrays = make_pool(blocks, block_bytes, seed)[1]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


class Reader:
    """This process's side: a pool of zeros and a transport."""

    def __init__(self, name: str, blocks: int, block_bytes: int, token: bytes = TOKEN) -> None:
        self.endpoint = Endpoint(sockets.listen("127.0.0.1", 0, setting="test"), Credentials("test", token))
        self.transport: Transport = transports.load(name)(self.endpoint)
        self.pool: KVPool
        self.pool, self.arrays = make_pool(blocks, block_bytes, None)
        self.transport.register(self.pool)
        self.endpoint.start()
        self.shapes = [BlockShape(block_bytes, block_bytes, blocks)] * REGIONS

    def connect(self, peer: Peer) -> Link:
        return self.transport.connect(peer.handle, Deadline.after(5, "test"))

    def plan(self, sources: list[int], targets: list[int]) -> BlockCopyPlan:
        return plan_blocks(self.shapes, sources, targets, "grant")

    def close(self) -> None:
        self.transport.close()
        self.endpoint.close()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    before = threading.active_count()
    with ExitStack() as held:
        yield held
    until = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() <= before, "a thread was left behind"


@pytest.fixture(params=["cma", "tcp"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def both(stack: ExitStack, name: str, blocks: int = 64, block_bytes: int = 4096) -> tuple[Peer, Reader]:
    peer, reader = Peer(name, blocks, block_bytes, seed=1), Reader(name, blocks, block_bytes)
    stack.callback(peer.close)
    stack.callback(reader.close)
    return peer, reader


def check(peer: Peer, reader: Reader, sources: list[int], targets: list[int]) -> None:
    for region in range(REGIONS):
        assert (reader.arrays[region][targets] == peer.arrays[region][sources]).all()
        untouched = np.setdiff1d(np.arange(peer.blocks), targets)
        assert not reader.arrays[region][untouched].any(), "bytes outside the plan were written"


@pytest.mark.parametrize("count", [0, 1, 2, 63])
def test_scattered_blocks_arrive_and_nothing_else_changes(stack: ExitStack, name: str, count: int) -> None:
    peer, reader = both(stack, name)
    rng = np.random.default_rng(count)
    sources, targets = rng.permutation(64)[:count].tolist(), rng.permutation(64)[:count].tolist()
    transfer = reader.connect(peer).read(reader.plan(sources, targets))
    transfer.wait(Deadline.after(10, "test"))
    assert transfer.done()
    check(peer, reader, sources, targets)


def test_a_hundred_thousand_blocks(stack: ExitStack, name: str) -> None:
    peer, reader = both(stack, name, blocks=50_000, block_bytes=64)
    rng = np.random.default_rng(0)
    sources, targets = rng.permutation(50_000).tolist(), rng.permutation(50_000).tolist()
    reader.connect(peer).read(reader.plan(sources, targets)).wait(Deadline.after(30, "test"))
    check(peer, reader, sources, targets)


def test_runs_longer_than_a_piece(stack: ExitStack, name: str) -> None:
    peer, reader = both(stack, name, blocks=10, block_bytes=5 << 20)
    blocks = list(range(10))
    reader.connect(peer).read(reader.plan(blocks, blocks)).wait(Deadline.after(30, "test"))
    check(peer, reader, blocks, blocks)


def test_transfers_on_one_link_and_many_links(stack: ExitStack, name: str) -> None:
    peer, reader = both(stack, name)
    links = [reader.connect(peer) for _ in range(3)]
    transfers = [links[i % 3].read(reader.plan([i], [63 - i])) for i in range(60)]
    for transfer in transfers:
        transfer.wait(Deadline.after(10, "test"))
    check(peer, reader, list(range(60)), [63 - i for i in range(60)])


def test_a_killed_peer_is_an_error_that_says_so(stack: ExitStack, name: str) -> None:
    peer, reader = both(stack, name)
    link = reader.connect(peer)
    peer.process.kill()
    peer.process.wait(10)
    with pytest.raises(TransferError, match=r"gone|closed|broke|connect"):
        link.read(reader.plan([1], [1])).wait(Deadline.after(10, "test"))


def test_a_peer_killed_in_the_middle(stack: ExitStack, name: str) -> None:
    peer, reader = both(stack, name, blocks=64, block_bytes=4 << 20)
    link = reader.connect(peer)
    blocks = list(range(64))
    transfers = [link.read(reader.plan(blocks, blocks)) for _ in range(8)]
    os.kill(peer.process.pid, signal.SIGKILL)
    errors = 0
    for transfer in transfers:
        try:
            transfer.wait(Deadline.after(20, "test"))
        except PeerGone:
            errors += 1
    assert errors
    with pytest.raises(LinkError):
        reader.connect(peer)


def test_a_stopped_peer_meets_the_deadline_or_does_not_matter(stack: ExitStack, name: str) -> None:
    """A stopped process's memory can still be read (cma); whoever needs its help (tcp) gives up in time."""
    peer, reader = both(stack, name)
    link = reader.connect(peer)
    os.kill(peer.process.pid, signal.SIGSTOP)
    stat = Path(f"/proc/{peer.process.pid}/stat")
    until = time.monotonic() + 5
    while stat.read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < until, "the peer was not stopped"
    transfer = link.read(reader.plan([3], [4]))
    if name == "cma":
        transfer.wait(Deadline.after(1.0, "test"))
        check(peer, reader, [3], [4])
        return
    with pytest.raises(DeadlineExceeded, match=r"setting: test"):
        transfer.wait(Deadline.after(0.5, "test"))
    os.kill(peer.process.pid, signal.SIGCONT)
    time.sleep(0.2)
    assert not any(array.any() for array in reader.arrays), "bytes were written after the transfer had ended"
    link.read(reader.plan([3], [4])).wait(Deadline.after(10, "test"))  # the link is made again


def test_cancel_stops_writing(stack: ExitStack, name: str) -> None:
    peer, reader = both(stack, name, blocks=64, block_bytes=4 << 20)
    link = reader.connect(peer)
    blocks = list(range(64))
    first, second = (link.read(reader.plan(blocks, blocks)) for _ in range(2))
    second.cancel()
    first.cancel()
    for array in reader.arrays:
        array[:] = 7
    time.sleep(0.2)
    assert all((array == 7).all() for array in reader.arrays)
    for transfer in (second, first):
        try:
            transfer.done()
        except TransferCancelledError:
            continue
    link.read(reader.plan([0], [0])).wait(Deadline.after(10, "test"))


def test_a_plan_outside_the_pools_is_refused_before_anything_moves(stack: ExitStack, name: str) -> None:
    peer, reader = both(stack, name)
    link = reader.connect(peer)
    good = reader.plan([1], [1])
    far = np.full(len(good), 1 << 40, np.int64)
    for bad in (
        BlockCopyPlan("g", good.region, far, good.target, good.nbytes),
        BlockCopyPlan("g", good.region, good.source, far, good.nbytes),
        BlockCopyPlan("g", good.region + 7, good.source, good.target, good.nbytes),
        BlockCopyPlan("g", good.region, good.source, good.target, far),
    ):
        with pytest.raises(TransferError, match=r"outside|does not have"):
            link.read(bad).wait(Deadline.after(5, "test"))
    assert not any(array.any() for array in reader.arrays)


def test_a_restarted_peer_is_not_taken_for_its_former_self(stack: ExitStack, name: str) -> None:
    peer, reader = both(stack, name)
    link = reader.connect(peer)
    peer.close()
    again = Peer(name, 64, 4096, seed=2, port=peer.port)
    stack.callback(again.close)
    with pytest.raises(PeerGone):
        link.read(reader.plan([1], [1])).wait(Deadline.after(5, "test"))
    with pytest.raises(LinkError):
        reader.connect(peer)
    reader.connect(again).read(reader.plan([1], [1])).wait(Deadline.after(5, "test"))
    check(again, reader, [1], [1])


def test_a_handle_of_garbage_is_a_link_error(stack: ExitStack, name: str) -> None:
    peer, reader = both(stack, name)
    for details in (b"", b"\xc1", b"\x80" * 50):
        broken = msgspec.structs.replace(peer.handle, details=details)
        with pytest.raises(LinkError):
            reader.transport.connect(broken, Deadline.after(2, "test"))


def test_tcp_needs_the_token(stack: ExitStack) -> None:
    peer = Peer("tcp", 4, 64, seed=1, token=bytes(31) + b"x")
    stack.callback(peer.close)
    reader = Reader("tcp", 4, 64)
    stack.callback(reader.close)
    with pytest.raises(LinkError, match="token"):
        reader.connect(peer)
