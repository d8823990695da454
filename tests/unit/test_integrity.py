"""Checksums: what is checked when, at what price, and that a wrong byte never passes for right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import Corrupt
from vllm_fleet.fabric import integrity
from vllm_fleet.fabric.contract import KVPool, Link, Region, TransferError
from vllm_fleet.fabric.endpoint import Endpoint, ask
from vllm_fleet.fabric.integrity import ChecksumError, Mode, Sampler, Verifier, sample
from vllm_fleet.fabric.plan import BlockCopyPlan, BlockShape, plan_blocks
from vllm_fleet.fabric.transports.tcp import TcpTransport
from vllm_fleet.net import sockets
from vllm_fleet.net.channel import Channel, Credentials, connect
from vllm_fleet.wire import fabric as wire
from vllm_fleet.wire.fabric import PoolHandle

CREDENTIALS = Credentials("test", bytes(32))
BLOCKS, BLOCK_BYTES = 40, 5000
SHAPES = [BlockShape(BLOCK_BYTES, BLOCK_BYTES, BLOCKS)] * 2


class Side:
    """One worker: a pool, a tcp transport and an endpoint that answers for checksums."""

    def __init__(self, stack: ExitStack, seed: int | None) -> None:
        rng = np.random.default_rng(seed)
        self.arrays = [
            np.zeros((BLOCKS, BLOCK_BYTES), np.uint8)
            if seed is None
            else rng.integers(0, 256, (BLOCKS, BLOCK_BYTES), np.uint8)
            for _ in SHAPES
        ]
        regions = [Region(int(a.ctypes.data), a.nbytes, BLOCK_BYTES, BLOCK_BYTES, BLOCKS) for a in self.arrays]
        self.pool = KVPool(tuple(regions), owner=self.arrays)
        self.endpoint = Endpoint(sockets.listen("127.0.0.1", 0, setting="test"), CREDENTIALS)
        integrity.serve(self.endpoint)
        self.transport = TcpTransport(self.endpoint)
        self.handle: PoolHandle = self.transport.register(self.pool)
        self.endpoint.start()
        stack.callback(self.endpoint.close)
        stack.callback(self.transport.close)


class Pair:
    """An owner, a reader, a link and a control connection between them."""

    def __init__(self, stack: ExitStack) -> None:
        self.owner, self.reader = Side(stack, 1), Side(stack, None)
        self.link: Link = self.reader.transport.connect(self.owner.handle, soon())
        self.channel: Channel = connect(self.owner.endpoint.host, self.owner.endpoint.port, CREDENTIALS, soon())
        stack.callback(self.channel.close)

    def verifier(self, mode: Mode) -> Verifier:
        return Verifier(self.reader.pool, mode, np.random.default_rng(0))

    def check(self) -> None:
        """Check a plan without copying it."""
        with self.verifier("full").checking(self.channel, self.owner.handle.pool, plan(), soon()):
            pass

    def copy(self, verifier: Verifier, plan: BlockCopyPlan, flip: tuple[int, int, int] | None = None) -> None:
        """Read a plan; ``flip`` is (region, block, byte): one bit of the reader's memory changes on the way."""
        with verifier.checking(self.channel, self.owner.handle.pool, plan, soon()):
            self.link.read(plan).wait(soon())
            if flip is not None:
                region, block, byte = flip
                self.reader.arrays[region][block, byte] ^= 1


@pytest.fixture
def pair() -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(stack)


def soon() -> Deadline:
    return Deadline.after(10, "test")


def plan(count: int = 30) -> BlockCopyPlan:
    rng = np.random.default_rng(2)
    return plan_blocks(SHAPES, rng.permutation(BLOCKS)[:count].tolist(), rng.permutation(BLOCKS)[:count].tolist(), "g")


@pytest.mark.parametrize("seed", range(5))
def test_full_finds_one_changed_bit_wherever_it_is(pair: Pair, seed: int) -> None:
    verifier, whole = pair.verifier("full"), plan()
    pair.copy(verifier, whole)
    assert verifier.pieces == len(whole)
    rng = np.random.default_rng(seed)
    run = int(rng.integers(len(whole)))
    region, at = int(whole.region[run]), int(whole.target[run]) + int(rng.integers(whole.nbytes[run]))
    with pytest.raises(ChecksumError, match=rf"1 of {len(whole)} checked pieces .* in region {region}"):
        pair.copy(verifier, whole, (region, at // BLOCK_BYTES, at % BLOCK_BYTES))
    pair.copy(verifier, whole)  # the connection is in step again


def test_sampled_checks_the_first_transfer_of_a_link(pair: Pair) -> None:
    few = plan(10)
    with pytest.raises(ChecksumError):
        pair.copy(pair.verifier("sampled"), few, (0, int(few.target[0]) // BLOCK_BYTES, 7))


def test_off_checks_nothing(pair: Pair) -> None:
    verifier, whole = pair.verifier("off"), plan()
    pair.copy(verifier, whole, (0, int(whole.target[0]) // BLOCK_BYTES, 7))
    assert verifier.pieces == 0


def test_a_failed_transfer_leaves_the_control_connection_in_step(pair: Pair) -> None:
    with (
        pytest.raises(TransferError, match="on the way"),
        pair.verifier("full").checking(pair.channel, pair.owner.handle.pool, plan(), soon()),
    ):
        raise TransferError("cut on the way")
    assert ask(pair.channel, wire.Ping(), soon()) == wire.Pong()


def test_checksums_are_only_given_for_what_may_be_read(pair: Pair) -> None:
    pair.owner.endpoint.allow_read = lambda grant, regions, offsets, nbytes: grant == "other"
    with pytest.raises(TransferError, match="gave no checksums: not_granted"):
        pair.check()
    pair.owner.transport.withdraw()
    with pytest.raises(TransferError, match="stale_pool"):
        pair.check()


def test_an_owner_with_another_checksum_or_too_few_is_not_believed(pair: Pair) -> None:
    question = wire.Digest("g", pair.owner.handle.pool, bytes(16) + (1).to_bytes(8, "little"), "crc7")
    assert ask(pair.channel, question, soon()) == wire.Denied("unsupported", "checksums here are xxh3")
    pair.owner.endpoint.handle(wire.Digest, lambda channel, asked: wire.Digests(b"\0" * 8))
    with pytest.raises(Corrupt, match="did not answer the 60 checksums"):
        pair.copy(pair.verifier("full"), plan())


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 0.01)), min_size=1, max_size=200))
def test_sampled_checks_cost_at_most_their_share_and_one_check(transfers: list[tuple[float, float]]) -> None:
    """However long copies and checks take, all checks but the first cost at most half a percent, and the last one."""
    sampler, copied, spent, dearest = Sampler(), 0.0, 0.0, 0.0
    for number, (copy_s, check_s) in enumerate(transfers):
        pieces = sampler.pieces()
        assert (pieces == integrity.FIRST_PIECES) == (number == 0)
        copied += copy_s
        if number and pieces:
            spent, dearest = spent + check_s, max(dearest, check_s)
        sampler.copied(copy_s, check_s if pieces else None)
    assert spent <= integrity.SHARE * copied + dearest + 1e-9


def test_sampled_goes_on_checking() -> None:
    sampler, checks = Sampler(), 0
    for _ in range(1000):
        pieces = sampler.pieces()
        checks += bool(pieces)
        sampler.copied(0.01, 100e-6 if pieces else None)
    assert 300 <= checks <= 600  # 10 s of copying pay for 50 ms of checks


@given(st.lists(st.integers(1, 300_000), min_size=1, max_size=30), st.integers(1, 40), st.integers(0, 99))
def test_samples_are_pieces_of_different_runs(sizes: list[int], count: int, seed: int) -> None:
    nbytes = np.array(sizes, np.int64)
    starts = np.cumsum(nbytes) - nbytes
    whole = BlockCopyPlan("g", np.arange(len(sizes)), starts, starts + 5, nbytes)
    part = sample(whole, count, np.random.default_rng(seed))
    assert len(part) == min(count, len(sizes)) == len(set(part.region.tolist()))
    runs = part.region
    assert (part.nbytes >= 1).all()
    assert (part.nbytes <= integrity.PIECE_BYTES_MAX).all()
    assert (part.source >= starts[runs]).all()
    assert (part.source + part.nbytes <= starts[runs] + nbytes[runs]).all()
    assert (part.target - part.source == 5).all()
