"""Two hosts: two network namespaces and a cable between them, which gets cut and slow."""

from __future__ import annotations

import time

import numpy as np
import pytest

from tests.contract import network
from tests.contract.fabric_peer import encode_handle, is_cancelled
from tests.contract.harness import Bench, Peer, Reader, eventually, same
from tests.contract.network import SecondHost, second_host
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import DeadlineExceeded
from vllm_fleet.fabric.contract import TransferError

pytestmark = pytest.mark.timeout(60)
PIECE_BYTES = 64 << 10


def two_hosts(bench: Bench, blocks: int) -> tuple[Peer, Reader, SecondHost]:
    reason = network.missing()
    if not bench.case.network:
        reason = f"{bench.case.name}: reaches this host only"
    if reason is not None:
        pytest.skip(reason)
    host = second_host()
    bench.keep(host.reset)
    peer = bench.new_peer(prefix=host.prefix, host=host.there)
    peer.make(blocks, PIECE_BYTES)
    return peer, bench.reader(blocks, PIECE_BYTES, host=host.here), host


def test_both_directions_between_two_hosts(bench: Bench) -> None:
    peer, reader, host = two_hosts(bench, blocks=64)
    peer.ask("allow", read=True, write=True)
    before = host.sent_bytes()
    link = reader.connect(peer)
    link.read(reader.whole()).wait(Deadline.after(20, "test"))
    assert same(reader.memory.read_back(), peer.arrays)
    assert host.sent_bytes() - before > 64 * PIECE_BYTES, "the bytes did not take the cable"
    reader.set(9)
    link.write(reader.whole()).wait(Deadline.after(20, "test"))
    assert all((array == 9).all() for array in peer.content())
    reader.set(3)
    peer.ask("start", handle=encode_handle(reader.handle), sources=[1, 5], targets=[2, 7], times=1)
    peer.ask("wait")
    assert all((array[[2, 7]] == 3).all() for array in peer.content())


def test_a_cable_cut_for_three_seconds(bench: Bench) -> None:
    """The transfer ends before its deadline, with the right bytes or with an error; the next one works."""
    peer, reader, host = two_hosts(bench, blocks=64)
    assert "tbf" in host.limit("80mbit")  # 8 MiB take 0.8 s: the cut falls into the transfer
    link = reader.connect(peer)
    before = host.sent_bytes()
    transfer = link.read(reader.whole())
    eventually("nothing moved", lambda: host.sent_bytes() - before > 1 << 20)
    host.plug(connected=False)
    eventually("the link is not down", lambda: host.state() == "down")
    at_cut = host.sent_bytes()
    assert not transfer.done()
    time.sleep(3.0)
    assert host.sent_bytes() == at_cut, "bytes moved over a cut cable"
    assert not transfer.done()
    host.plug(connected=True)
    eventually("the link is not up", lambda: host.state() == "up")
    try:
        transfer.wait(Deadline.after(30, "test"))
    except DeadlineExceeded:
        raise
    except TransferError:
        pass
    else:
        assert same(reader.memory.read_back(), peer.arrays)
    reader.set(0)
    reader.connect(peer).read(reader.whole()).wait(Deadline.after(20, "test"))
    assert same(reader.memory.read_back(), peer.arrays)


def test_ten_megabits_per_second(bench: Bench) -> None:
    """Slow is right all the same, and cancel does not wait for the rest."""
    peer, reader, host = two_hosts(bench, blocks=64)
    assert "rate 10Mbit" in host.limit("10mbit")
    link = reader.connect(peer)
    few = list(range(4))
    link.read(reader.plan(few, few)).wait(Deadline.after(20, "test"))
    for got, wanted in zip(reader.memory.read_back(), peer.arrays, strict=True):
        assert (got[few] == wanted[few]).all()
    before = host.sent_bytes()
    transfer = link.read(reader.whole())
    eventually("nothing moved", lambda: host.sent_bytes() - before > 128 << 10)
    transfer.cancel()
    assert is_cancelled(transfer)
    assert host.sent_bytes() - before < 64 * PIECE_BYTES, "cancel waited for the bytes"
    reader.set(7)
    time.sleep(0.5)
    assert reader.holds(7)
    reader.set(0)
    link.read(reader.plan([9], [8])).wait(Deadline.after(20, "test"))
    for got, wanted in zip(reader.memory.read_back(), peer.arrays, strict=True):
        assert (got[8] == wanted[9]).all()
        assert not np.delete(got, 8, axis=0).any()
