"""Registrations: withdrawn, replaced, freed or restarted memory never counts as the memory that was registered."""

from __future__ import annotations

import random
import time

import pytest

from tests.contract.fabric_peer import is_cancelled
from tests.contract.harness import Bench, check, same
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import LinkError, PeerGone
from vllm_fleet.fabric.contract import TransferError

pytestmark = pytest.mark.timeout(30)


def soon() -> Deadline:
    return Deadline.after(20, "test")


@pytest.mark.parametrize("how", ["withdraw", "free", "register"])
def test_an_old_handle_fails_and_so_does_a_link_that_was_open_before(bench: Bench, how: str) -> None:
    peer, reader = bench.start()
    peer.ask("allow", read=True, write=True)
    link = reader.connect(peer)
    link.read(reader.plan([1], [1])).wait(soon())
    peer.ask(how)
    for start in (link.read, link.write):
        with pytest.raises(TransferError):
            start(reader.plan([2], [2])).wait(soon())
    with pytest.raises(LinkError):
        reader.connect(peer)
    if how != "free":
        assert same(peer.content(), peer.arrays), "a write got into memory that is not registered"
    peer.make(seed=3)
    fresh = bench.reader()
    fresh.connect(peer).read(fresh.plan([2], [2])).wait(soon())
    check(peer, fresh, [2], [2])


def test_memory_withdrawn_during_a_transfer_never_counts_as_success(bench: Bench) -> None:
    """The owner withdraws at random moments and at once uses the memory for something else."""
    blocks, times, block_bytes = 256 if bench.case.gpus else 32, 4, 128 << 10
    peer, reader = bench.start(blocks, block_bytes)
    reader = bench.reader(blocks * times, block_bytes)  # each transfer has a place of its own
    plans = [reader.plan(list(range(blocks)), list(range(i * blocks, (i + 1) * blocks))) for i in range(times)]
    link = reader.connect(peer)
    link.read(plans[0]).wait(soon())
    began = time.monotonic()
    link.read(plans[0]).wait(soon())
    usual_s = time.monotonic() - began
    rng, failures, successes = random.Random(1), 0, 0
    for seed in range(10):
        peer.make(blocks, block_bytes, seed=10 + seed)
        link = reader.connect(peer)
        late = seed % 2 == 0
        transfers = [link.read(plan) for plan in plans] if late else []
        time.sleep(rng.uniform(0, times * usual_s) if late else 0)
        peer.tell("reuse", value=0xEE)
        if not late:  # a copy that takes less time than telling the peer to withdraw
            time.sleep(rng.uniform(0, times * usual_s))
            transfers = [link.read(plan) for plan in plans]
        for index, transfer in enumerate(transfers):
            try:
                transfer.wait(soon())
            except TransferError:
                failures += 1
                continue
            successes += 1
            for got, wanted in zip(reader.memory.read_back(), peer.arrays, strict=True):
                assert (got[index * blocks : (index + 1) * blocks] == wanted).all()
        peer.hear()
        link.close()
    assert failures
    assert successes


def test_our_own_withdrawal_ends_our_transfers(bench: Bench) -> None:
    peer, reader = bench.start(blocks=64, block_bytes=256 << 10)
    link = reader.connect(peer)
    transfers = [link.read(reader.whole()) for _ in range(4000 if bench.case.gpus else 80)]
    reader.transport.withdraw()
    reader.transport.withdraw()
    reader.set(7)
    time.sleep(0.05)
    assert reader.holds(7), "bytes were written into withdrawn memory"
    assert any(map(is_cancelled, transfers))
    with pytest.raises(TransferError):
        link.read(reader.plan([1], [1])).wait(soon())
    with pytest.raises(LinkError, match="register"):
        reader.connect(peer)
    reader.transport.register(reader.memory.pool)
    reader.connect(peer).read(reader.whole()).wait(soon())
    assert same(reader.memory.read_back(), peer.arrays)


@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
def test_nothing_moves_without_a_grant(bench: Bench, write: bool) -> None:
    peer, reader = bench.start()
    if reader.transport.capabilities.one_sided and not bench.case.one_process:
        pytest.skip(f"{bench.case.name}: one-sided, the owner is not asked while bytes move")
    peer.ask("allow", read=write, write=False)
    link = reader.connect(peer)
    plan = reader.plan([1], [2])
    with pytest.raises(TransferError, match="not_granted"):
        (link.write(plan) if write else link.read(plan)).wait(soon())
    assert reader.holds(0)
    assert same(peer.content(), peer.arrays)
    peer.ask("allow", read=True, write=True)
    (link.write(plan) if write else link.read(plan)).wait(soon())
    if write:
        assert not any(array[2].any() for array in peer.content())
    else:
        check(peer, reader, [1], [2])


def test_a_restarted_peer_is_not_taken_for_its_former_self(bench: Bench) -> None:
    if bench.case.one_process:
        pytest.skip(f"{bench.case.name}: a process cannot restart alone when both sides are in it")
    peer = bench.new_peer()
    peer.make()
    reader = bench.reader()
    link = reader.connect(peer)
    peer.process.kill()
    peer.process.wait(10)
    again = bench.new_peer(port=peer.port)
    again.make(seed=2)
    with pytest.raises(PeerGone):
        link.read(reader.plan([1], [1])).wait(soon())
    with pytest.raises(LinkError):
        reader.connect(peer)
    reader.connect(again).read(reader.plan([1], [1])).wait(soon())
    check(again, reader, [1], [1])
