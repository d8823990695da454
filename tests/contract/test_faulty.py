"""What each scripted fault does, around real transports: two pools in this process over memory and over tcp."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from tests.contract.fabric_peer import is_cancelled
from tests.contract.pools import CpuMemory, constant, pattern
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import BadRequest, LinkError
from vllm_fleet.fabric.contract import Link, Transfer, TransferError
from vllm_fleet.fabric.endpoint import Endpoint
from vllm_fleet.fabric.faults import (
    ConnectFault,
    Corrupt,
    Cut,
    Delay,
    Refuse,
    Reorder,
    Rule,
    Script,
    TransferFault,
    Truncate,
)
from vllm_fleet.fabric.plan import BlockCopyPlan, BlockShape, plan_blocks
from vllm_fleet.fabric.transports import load
from vllm_fleet.fabric.transports.faulty import faulty
from vllm_fleet.net import sockets
from vllm_fleet.net.channel import Credentials
from vllm_fleet.wire.fabric import PoolHandle

BLOCKS, BLOCK_BYTES = 16, 4096
TOTAL = 2 * BLOCKS * BLOCK_BYTES


class Pair:
    """An owner with the inner transport, and a reader with faults."""

    def __init__(self, inner: str, stack: ExitStack) -> None:
        self._inner, self._stack = inner, stack
        self.theirs, self.ours = (CpuMemory(BLOCKS, BLOCK_BYTES) for _ in range(2))
        self.wanted = pattern(BLOCKS, BLOCK_BYTES, 1)
        self.theirs.fill(self.wanted)
        owner = self._endpoint()
        owner.allow_write = lambda grant, regions, offsets, nbytes: True
        transport = load(inner)(owner)
        stack.callback(transport.close)
        self.handle: PoolHandle = transport.register(self.theirs.pool)
        owner.start()

    def _endpoint(self) -> Endpoint:
        endpoint = Endpoint(sockets.listen("127.0.0.1", 0, setting="test"), Credentials("test", bytes(32)))
        self._stack.callback(endpoint.close)
        return endpoint

    def link(self, script: Script) -> Link:
        endpoint = self._endpoint()
        transport = faulty(load(self._inner), script)(endpoint)
        self._stack.callback(transport.close)
        transport.register(self.ours.pool)
        endpoint.start()
        assert transport.name == self.handle.transport
        return transport.connect(self.handle, soon())

    def missing(self) -> list[int]:
        """Places in the order of the plan at which our bytes are not the wanted ones."""
        got = np.concatenate([array.ravel() for array in self.ours.read_back()])
        wanted = np.concatenate([array.ravel() for array in self.wanted])
        return [int(place) for place in np.flatnonzero(got != wanted)]


@pytest.fixture(params=["memory", "tcp"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(request.param, stack)


def soon() -> Deadline:
    return Deadline.after(10, "test")


def whole(order: list[int] | None = None) -> BlockCopyPlan:
    order = list(range(BLOCKS)) if order is None else order
    return plan_blocks([BlockShape(BLOCK_BYTES, BLOCK_BYTES, BLOCKS)] * 2, order, order, "g")


def always(fault: TransferFault) -> Script:
    return Script(transfers=(Rule(fault),))


def test_a_cut_moves_the_first_bytes_and_fails(pair: Pair) -> None:
    link = pair.link(Script(transfers=(Rule(Cut(5000), nth=0),)))
    with pytest.raises(TransferError, match="cut by the script after 5000 bytes"):
        link.read(whole()).wait(soon())
    assert min(pair.missing()) >= 5000
    assert not np.concatenate([a.ravel() for a in pair.ours.read_back()])[5000:].any()
    link.read(whole()).wait(soon())  # only the first one was cut
    assert pair.missing() == []


def test_a_cut_beyond_the_end_does_nothing(pair: Pair) -> None:
    pair.link(always(Cut(TOTAL))).read(whole()).wait(soon())
    assert pair.missing() == []


def test_a_delay_is_waited_for_and_ends_with_cancel(pair: Pair) -> None:
    link = pair.link(always(Delay(0.1)))
    transfer = link.read(whole())
    time.sleep(0.03)
    assert not transfer.done()
    assert len(pair.missing()) > TOTAL / 2
    transfer.wait(soon())
    assert pair.missing() == []
    long = pair.link(always(Delay(3600.0))).read(whole())
    time.sleep(0.03)
    long.cancel()
    assert is_cancelled(long)


@pytest.mark.parametrize("write", [False, True])
def test_reordered_transfers_are_right(pair: Pair, write: bool) -> None:
    link = pair.link(Script(transfers=(Rule(Reorder(1)), Rule(Delay(0.0)))))
    if write:
        pair.ours.fill(constant(BLOCKS, BLOCK_BYTES, 5))
        link.write(whole([3, 1, 2, 9, 8, 15])).wait(soon())
        touched = sorted({int(i) for i in np.flatnonzero((pair.theirs.read_back()[0] == 5).all(axis=1))})
        assert touched == [1, 2, 3, 8, 9, 15]
        return
    for plan in (whole(), whole(np.random.default_rng(0).permutation(BLOCKS).tolist()), whole([])):
        link.read(plan).wait(soon())
    assert pair.missing() == []


def test_a_truncated_read_claims_success_without_its_last_bytes(pair: Pair) -> None:
    transfer = pair.link(always(Truncate(100))).read(whole())
    transfer.wait(soon())
    assert transfer.done()
    assert pair.missing()
    assert min(pair.missing()) >= TOTAL - 100
    assert not pair.ours.read_back()[-1].ravel()[-100:].any()


def test_a_corrupted_read_claims_success_with_one_wrong_byte(pair: Pair) -> None:
    transfer = pair.link(always(Corrupt(offset=BLOCKS * BLOCK_BYTES + 7, xor=0x10))).read(whole())
    transfer.wait(soon())
    assert pair.missing() == [BLOCKS * BLOCK_BYTES + 7]
    assert pair.ours.read_back()[1].ravel()[7] == pair.wanted[1].ravel()[7] ^ 0x10


def test_a_corrupted_write_arrives_wrong_and_leaves_our_bytes_as_they_were(pair: Pair) -> None:
    own = pattern(BLOCKS, BLOCK_BYTES, 4)
    pair.ours.fill(own)
    pair.link(always(Corrupt(offset=3 + TOTAL))).write(whole()).wait(soon())
    wrong = np.flatnonzero(pair.theirs.read_back()[0].ravel() != own[0].ravel()).tolist()
    assert wrong == [3]
    assert (pair.theirs.read_back()[1] == own[1]).all()
    assert all((a == b).all() for a, b in zip(pair.ours.read_back(), own, strict=True))


def test_faults_at_connect(pair: Pair) -> None:
    with pytest.raises(LinkError, match="the cable is out"):
        pair.link(Script(connects=(Rule(Refuse("the cable is out"), nth=0),)))
    pair.link(Script(connects=(Rule(Refuse("the cable is out"), nth=1), Rule(Delay(0.01))))).close()


def outcomes(pair: Pair, seed: int) -> list[bool]:
    link = pair.link(Script(transfers=(Rule(Cut(10), probability=0.4),), seed=seed))
    transfers: list[Transfer] = [link.read(whole()) for _ in range(40)]
    return [succeeded(transfer) for transfer in transfers]


def succeeded(transfer: Transfer) -> bool:
    try:
        transfer.wait(soon())
    except TransferError:
        return False
    return True


def test_the_same_seed_gives_the_same_faults_and_another_seed_others(pair: Pair) -> None:
    first, again, other = outcomes(pair, 1), outcomes(pair, 1), outcomes(pair, 2)
    assert first == again != other
    assert 5 < sum(first) < 35


@pytest.mark.parametrize(
    ("transfers", "connects"),
    [
        ((Refuse("x"),), ()),
        ((), (Cut(1),)),
        ((Cut(-1),), ()),
        ((Delay(-0.1),), ()),
        ((Truncate(-1),), ()),
        ((Corrupt(-1),), ()),
        ((Corrupt(1, xor=0),), ()),
        ((Corrupt(1, xor=256),), ()),
    ],
)
def test_a_script_that_makes_no_sense_is_refused(
    transfers: tuple[TransferFault | ConnectFault, ...], connects: tuple[TransferFault | ConnectFault, ...]
) -> None:
    with pytest.raises(BadRequest):
        Script(tuple(map(Rule, transfers)), tuple(map(Rule, connects)))


@pytest.mark.parametrize("rule", [{"probability": 1.1}, {"probability": -0.1}, {"nth": -1}])
def test_a_rule_that_makes_no_sense_is_refused(rule: dict[str, float]) -> None:
    with pytest.raises(BadRequest):
        Script(transfers=(Rule(Cut(1), **rule),))  # type: ignore[arg-type]
