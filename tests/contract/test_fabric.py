"""What every transport promises: the right bytes arrive, and no others change. The peer is a process of its own."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from tests.contract.fabric_peer import block_ids, encode_handle
from tests.contract.harness import Bench, check, same
from tests.contract.pools import REGIONS, pattern
from vllm_fleet.core.deadline import Deadline

pytestmark = pytest.mark.timeout(30)


def soon() -> Deadline:
    return Deadline.after(20, "test")


@pytest.mark.parametrize("count", [0, 1, 2, 63])
def test_scattered_blocks_arrive_and_nothing_else_changes(bench: Bench, count: int) -> None:
    peer, reader = bench.start()
    sources, targets = block_ids(64, count, seed=count)
    transfer = reader.connect(peer).read(reader.plan(sources, targets))
    transfer.wait(soon())
    assert transfer.done()
    transfer.cancel()  # harmless when it has ended
    assert transfer.done()
    check(peer, reader, sources, targets)


@pytest.mark.parametrize("count", [0, 1, 2, 63])
def test_scattered_blocks_are_written_and_nothing_else_changes(bench: Bench, count: int) -> None:
    peer, reader = bench.start()
    peer.ask("allow", read=True, write=True)
    own = pattern(64, 4096, seed=9)
    reader.memory.fill(own)
    sources, targets = block_ids(64, count, seed=count)
    reader.connect(peer).write(reader.plan(sources, targets)).wait(soon())
    wanted = [array.copy() for array in peer.arrays]
    for region in range(REGIONS):
        wanted[region][targets] = own[region][sources]
    assert same(peer.content(), wanted)
    assert same(reader.memory.read_back(), own)


@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
def test_a_hundred_thousand_blocks(bench: Bench, write: bool) -> None:
    peer, reader = bench.start(blocks=50_000, block_bytes=64)
    sources, targets = block_ids(50_000, 50_000, seed=0)
    if not write:
        reader.connect(peer).read(reader.plan(sources, targets)).wait(Deadline.after(40, "test"))
        check(peer, reader, sources, targets)
        return
    peer.ask("allow", read=True, write=True)
    own = pattern(50_000, 64, seed=9)
    reader.memory.fill(own)
    reader.connect(peer).write(reader.plan(sources, targets)).wait(Deadline.after(40, "test"))
    for got, sent in zip(peer.content(), own, strict=True):
        assert (got[targets] == sent[sources]).all()


def test_runs_longer_than_a_piece(bench: Bench) -> None:
    peer, reader = bench.start(blocks=5, block_bytes=5 << 20)
    blocks = list(range(5))
    reader.connect(peer).read(reader.plan(blocks, blocks)).wait(soon())
    check(peer, reader, blocks, blocks)


def test_transfers_on_one_link_and_many_links(bench: Bench) -> None:
    peer, reader = bench.start()
    links = [reader.connect(peer) for _ in range(3)]
    transfers = [links[i % 3].read(reader.plan([i], [63 - i])) for i in range(60)]
    for transfer in transfers:
        transfer.wait(soon())
    check(peer, reader, list(range(60)), [63 - i for i in range(60)])
    for link in links:
        link.close()
        link.close()


def test_transfers_from_several_threads(bench: Bench) -> None:
    peer, reader = bench.start()
    shared = reader.connect(peer)
    failed: list[BaseException] = []

    def work(first: int) -> None:
        try:
            own = reader.connect(peer)
            for block in range(first, first + 16):
                link = shared if block % 2 else own
                link.read(reader.plan([block], [63 - block])).wait(soon())
        except BaseException as error:  # noqa: BLE001 - told to the test, which raises it
            failed.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(0, 64, 16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    check(peer, reader, list(range(64)), [63 - i for i in range(64)])


def test_reads_and_writes_on_one_link_keep_their_order(bench: Bench) -> None:
    peer, reader = bench.start()
    peer.ask("allow", read=True, write=True)
    link = reader.connect(peer)
    transfers = []
    for block in range(20):  # a block of the peer's travels to us and back to its neighbour, and so on
        transfers.append(link.read(reader.plan([block], [block])))
        transfers.append(link.write(reader.plan([block], [block + 1])))
    for transfer in transfers:
        transfer.wait(soon())
    for got, first in zip(peer.content(), peer.arrays, strict=True):
        assert (got[:21] == first[0]).all()
        assert (got[21:] == first[21:]).all()


def test_two_processes_read_from_each_other_at_once(bench: Bench) -> None:
    peer, reader = bench.start(blocks=64, block_bytes=64 << 10)
    own = pattern(64, 64 << 10, seed=9)
    reader.memory.fill([np.concatenate([a[:32], np.zeros_like(a[32:])]) for a in own])
    link = reader.connect(peer)
    lower, upper = list(range(32)), list(range(32, 64))
    peer.ask("start", handle=encode_handle(reader.handle), sources=lower, targets=upper, times=10)
    transfers = [link.read(reader.plan(lower, upper)) for _ in range(10)]
    for transfer in transfers:
        transfer.wait(soon())
    peer.ask("wait")
    for got, theirs, ours, at_peer in zip(reader.memory.read_back(), peer.arrays, own, peer.content(), strict=True):
        assert (got[:32] == ours[:32]).all()
        assert (got[32:] == theirs[:32]).all()
        assert (at_peer[:32] == theirs[:32]).all()
        assert (at_peer[32:] == ours[:32]).all()
