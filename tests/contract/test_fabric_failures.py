"""Death, stopping, cancelling and nonsense: every transfer ends, says why, and never writes after its end."""

from __future__ import annotations

import os
import random
import signal
import time

import msgspec
import numpy as np
import pytest

from tests.contract.fabric_peer import is_cancelled
from tests.contract.harness import Bench, check, eventually, same, state
from tests.contract.pools import constant
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import DeadlineExceeded, LinkError, PeerGone
from vllm_fleet.fabric.contract import Transfer, TransferError
from vllm_fleet.fabric.plan import BlockCopyPlan

pytestmark = pytest.mark.timeout(30)


def soon() -> Deadline:
    return Deadline.after(20, "test")


def needs_processes(bench: Bench) -> None:
    if bench.case.one_process:
        pytest.skip(f"{bench.case.name}: both sides are in one process, which cannot be stopped alone")


def many(bench: Bench) -> int:
    """Transfers of 32 MiB that take long enough for something to happen meanwhile."""
    return 4000 if bench.case.gpus else 80


def test_a_killed_peer_is_an_error_that_says_so(bench: Bench) -> None:
    needs_processes(bench)
    peer, reader = bench.start()
    link = reader.connect(peer)
    os.kill(peer.pid, signal.SIGKILL)
    peer.process.wait(10)
    with pytest.raises(TransferError, match=r"gone|closed|broke|cannot connect|lost|disconnect"):
        link.read(reader.plan([1], [1])).wait(soon())


def test_a_peer_killed_in_the_middle(bench: Bench) -> None:
    needs_processes(bench)
    peer, reader = bench.start(blocks=64, block_bytes=256 << 10)
    link = reader.connect(peer)
    transfers = [link.read(reader.whole()) for _ in range(many(bench))]
    transfers[0].wait(soon())
    assert bench.case.gpus or not transfers[-1].done()
    os.kill(peer.pid, signal.SIGKILL)
    peer.process.wait(10)
    transfers += [link.read(reader.whole()) for _ in range(3)]  # a GPU may have done all the others by now
    outcomes = [outcome(transfer) for transfer in transfers]
    first = outcomes.index("failed")
    assert first > 0
    assert set(outcomes[first:]) == {"failed"}, "a transfer was done after the death"
    with pytest.raises(LinkError):
        reader.connect(peer)


def outcome(transfer: Transfer) -> str:
    try:
        transfer.wait(Deadline.after(30, "test"))
    except DeadlineExceeded:
        return "late"
    except PeerGone:
        return "failed"
    return "done"


def test_a_stopped_peer_meets_the_deadline_or_does_not_matter(bench: Bench) -> None:
    """Where reads are one-sided the owner may be stopped; whoever needs its help gives up in time."""
    needs_processes(bench)
    peer, reader = bench.start()
    link = reader.connect(peer)
    bench.keep(lambda: os.kill(peer.pid, signal.SIGCONT))
    os.kill(peer.pid, signal.SIGSTOP)
    eventually("the peer was not stopped", lambda: state(peer.pid) == "T")
    transfer = link.read(reader.plan([3], [4]))
    if reader.transport.capabilities.one_sided:
        transfer.wait(soon())
        check(peer, reader, [3], [4])
        return
    with pytest.raises(DeadlineExceeded, match=r"setting: test"):
        transfer.wait(Deadline.after(0.5, "test"))
    assert state(peer.pid) == "T"
    os.kill(peer.pid, signal.SIGCONT)
    time.sleep(0.2)
    assert reader.holds(0), "bytes were written after the transfer had ended"
    link.read(reader.plan([3], [4])).wait(soon())  # the link is made again
    check(peer, reader, [3], [4])


def test_a_peer_stopped_in_the_middle(bench: Bench) -> None:
    needs_processes(bench)
    peer, reader = bench.start(blocks=64, block_bytes=256 << 10)
    link = reader.connect(peer)
    bench.keep(lambda: os.kill(peer.pid, signal.SIGCONT))
    transfers = [link.read(reader.whole()) for _ in range(many(bench))]
    transfers[0].wait(soon())
    os.kill(peer.pid, signal.SIGSTOP)
    eventually("the peer was not stopped", lambda: state(peer.pid) == "T")
    if reader.transport.capabilities.one_sided:
        transfers[-1].wait(Deadline.after(40, "test"))
        assert same(reader.memory.read_back(), peer.arrays)
        return
    with pytest.raises(DeadlineExceeded):
        transfers[-1].wait(Deadline.after(0.5, "test"))
    link.close()
    reader.set(7)
    os.kill(peer.pid, signal.SIGCONT)
    time.sleep(0.2)
    assert reader.holds(7), "bytes were written after the link was closed"
    reader.connect(peer).read(reader.whole()).wait(soon())
    assert same(reader.memory.read_back(), peer.arrays)


def test_cancelled_reads_write_nothing_more(bench: Bench) -> None:
    peer, reader = bench.start(blocks=64, block_bytes=128 << 10)
    link = reader.connect(peer)
    link.read(reader.whole()).wait(soon())
    began = time.monotonic()
    link.read(reader.whole()).wait(soon())
    usual_s = time.monotonic() - began
    rng, stopped = random.Random(1), 0
    for _ in range(15):
        transfers = [link.read(reader.whole()) for _ in range(2)]
        time.sleep(rng.uniform(0, 1.5 * usual_s))
        for transfer in reversed(transfers):
            transfer.cancel()
        reader.set(7)
        time.sleep(0.01)
        assert reader.holds(7)
        stopped += sum(map(is_cancelled, transfers))
    assert stopped
    time.sleep(0.1)
    assert reader.holds(7)
    link.read(reader.whole()).wait(soon())
    assert same(reader.memory.read_back(), peer.arrays)


def test_a_cancelled_write_takes_nothing_more_from_our_pool(bench: Bench) -> None:
    peer, reader = bench.start(blocks=64, block_bytes=64 << 10)
    peer.ask("allow", read=True, write=True)
    link = reader.connect(peer)
    rng, stopped = random.Random(2), 0
    for _ in range(6):
        reader.set(0x11)
        transfers = [link.write(reader.whole()) for _ in range(3)]
        time.sleep(rng.uniform(0, 0.01))
        for transfer in reversed(transfers):
            transfer.cancel()
        reader.set(0x22)
        time.sleep(0.02)
        assert not any((array == 0x22).all(axis=1).any() for array in peer.content())
        stopped += sum(map(is_cancelled, transfers))
    assert stopped
    link.write(reader.whole()).wait(soon())
    assert same(peer.content(), constant(64, 64 << 10, 0x22))


def test_closing_a_link_ends_what_runs(bench: Bench) -> None:
    peer, reader = bench.start(blocks=64, block_bytes=256 << 10)
    link = reader.connect(peer)
    transfers = [link.read(reader.whole()) for _ in range(many(bench))]
    link.close()
    reader.set(7)
    assert any(map(is_cancelled, transfers))
    with pytest.raises(TransferError, match="closed"):
        link.read(reader.plan([1], [1])).wait(soon())
    time.sleep(0.05)
    assert reader.holds(7)


@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
def test_a_plan_outside_the_pools_is_refused_before_anything_moves(bench: Bench, write: bool) -> None:
    peer, reader = bench.start()
    peer.ask("allow", read=True, write=True)
    link = reader.connect(peer)
    good = reader.plan([1], [1])
    far, negative = np.full(len(good), 1 << 40, np.int64), np.full(len(good), -4096, np.int64)
    for bad in (
        BlockCopyPlan("grant", good.region, far, good.target, good.nbytes),
        BlockCopyPlan("grant", good.region, good.source, far, good.nbytes),
        BlockCopyPlan("grant", good.region, negative, good.target, good.nbytes),
        BlockCopyPlan("grant", good.region, good.source, negative, good.nbytes),
        BlockCopyPlan("grant", good.region + 7, good.source, good.target, good.nbytes),
        BlockCopyPlan("grant", good.region - 1, good.source, good.target, good.nbytes),
        BlockCopyPlan("grant", good.region, good.source, good.target, far),
        BlockCopyPlan("grant", good.region, far + (2**63 - 1 - (1 << 40)), good.target, good.nbytes),
        BlockCopyPlan("grant", good.region, good.source, good.target, negative),
    ):
        with pytest.raises(TransferError, match=r"outside|does not have|negative|empty"):
            (link.write(bad) if write else link.read(bad)).wait(soon())
    assert reader.holds(0)
    assert same(peer.content(), peer.arrays)
    link.read(good).wait(soon())
    check(peer, reader, [1], [1])


def test_a_handle_of_garbage_is_a_link_error(bench: Bench) -> None:
    peer, reader = bench.start()
    details = peer.handle.details
    garbage = [b"", b"\xc1", b"\x80" * 50, details[:-1], details[: len(details) // 2], b"\x91" * 4096]
    for broken in garbage:
        with pytest.raises(LinkError):
            reader.transport.connect(msgspec.structs.replace(peer.handle, details=broken), Deadline.after(5, "test"))
    unknown = msgspec.structs.replace(peer.handle, pool="0" * 32)
    if not bench.case.name.startswith("cma"):  # cma's registration is the nonce in the details
        with pytest.raises(LinkError):
            reader.transport.connect(unknown, Deadline.after(5, "test"))
    reader.connect(peer).read(reader.plan([1], [1])).wait(soon())
    check(peer, reader, [1], [1])


def test_a_wrong_token_gets_no_link(bench: Bench) -> None:
    if bench.case.name in ("memory", "cma"):
        pytest.skip(f"{bench.case.name}: nothing is asked over a connection; the kernel decides by process and user")
    peer = bench.new_peer(token=bytes(31) + b"x")
    peer.make(4, 64)
    reader = bench.reader(4, 64)
    with pytest.raises(LinkError, match="token"):
        reader.connect(peer)
