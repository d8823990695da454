"""What cuda_ipc promises beyond the conformance suite (tests/contract). One GPU is enough, two show more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

import msgspec
import numpy as np
import pytest

from tests.contract import cuda_pool
from tests.contract.cases import CASES
from tests.contract.fabric_peer import encode_handle
from tests.contract.harness import ROOT, Bench, Peer, Peers, Reader, check, eventually, same, state
from tests.contract.pools import pattern
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import LinkError
from vllm_fleet.fabric.contract import KVPool, Region, Transfer, TransferError
from vllm_fleet.fabric.transports.cuda import driver
from vllm_fleet.fabric.transports.cuda_ipc import CudaIpcDetails

CASE = CASES["cuda_ipc"]
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]
if CASE.missing() is not None:
    pytest.skip(CASE.missing() or "", allow_module_level=True)

GIB = 1 << 30
PEER_DEVICE, OWN_DEVICE = CASE.device(peer=True) or 0, CASE.device(peer=False) or 0


def soon() -> Deadline:
    return Deadline.after(20, "test")


@pytest.fixture
def bench(peers: Peers) -> Iterator[Bench]:
    cuda_pool.settle(OWN_DEVICE)
    with ExitStack() as stack:
        yield Bench(CASE, peers.get(CASE), stack)


def free_bytes(device: int) -> int:
    import torch

    return int(torch.cuda.mem_get_info(device)[0])


def test_a_plan_of_several_parts_in_scattered_blocks_both_ways(bench: Bench) -> None:
    blocks, block_bytes = (256 << 20) // 2 // (32 << 10), 32 << 10
    peer, reader = bench.start(blocks, block_bytes)
    link = reader.connect(peer)
    order = np.random.default_rng(1).permutation(blocks).tolist()
    link.read(reader.plan(list(range(blocks)), order)).wait(soon())
    for got, there in zip(reader.memory.read_back(), peer.arrays, strict=True):
        assert (got[order] == there).all()
    peer.ask("allow", read=True, write=True)
    peer.ask("set", value=0)
    link.write(reader.plan(order, list(range(blocks)))).wait(soon())
    reader.memory.fill(pattern(blocks, block_bytes, 99))
    link.read(reader.whole()).wait(soon())
    assert same(reader.memory.read_back(), peer.arrays)


def test_a_prepared_plan_is_read_and_only_the_last_ones_stay_prepared(bench: Bench) -> None:
    peer, reader = bench.start()
    link = reader.connect(peer)
    plans = [reader.plan([block], [block]) for block in range(12)]
    for plan in plans:
        link.prepare(plan)
    for plan in plans:
        link.read(plan).wait(soon())
    blocks = list(range(12))
    check(peer, reader, blocks, blocks)
    link.close()
    link.prepare(plans[0])
    with pytest.raises(TransferError, match="closed"):
        link.read(plans[0]).wait(soon())


def test_a_prepared_plan_follows_what_is_in_the_blocks_when_it_is_read(bench: Bench) -> None:
    peer, reader = bench.start()
    link = reader.connect(peer)
    plan = reader.whole()
    for value in (3, 200, 7):
        link.prepare(plan)
        peer.ask("set", value=value)
        link.read(plan).wait(soon())
        assert reader.holds(value)


def test_a_plan_that_was_prepared_before_the_memory_was_withdrawn_fails(bench: Bench) -> None:
    peer, reader = bench.start()
    link = reader.connect(peer)
    plan = reader.whole()
    link.prepare(plan)
    peer.ask("reuse", value=9)
    with pytest.raises(TransferError):
        link.read(plan).wait(soon())


@pytest.mark.parametrize("prepared", [False, True])
def test_memory_withdrawn_while_it_is_read_is_right_or_refused(bench: Bench, prepared: bool) -> None:
    for _ in range(3):
        peer, reader = bench.start(1024, 32 << 10)
        link = reader.connect(peer)
        plans = [reader.whole() for _ in range(4)]
        for plan in plans if prepared else []:
            link.prepare(plan)
        peer.tell("reuse", value=9)
        for plan in plans:
            if not right_or_failed(link.read(plan), reader, peer):
                break
        peer.hear()
        with pytest.raises(TransferError):
            link.read(reader.plan([1], [1])).wait(soon())
        reader.close()


def test_memory_of_a_dead_owner_is_unmapped_while_nothing_is_asked(bench: Bench) -> None:
    peer = bench.new_peer()
    peer.make(4096, 256 << 10)  # 2 GiB
    reader = bench.reader(64, 4096)
    reader.connect(peer)
    before = free_bytes(PEER_DEVICE)
    os.kill(peer.pid, signal.SIGKILL)
    peer.process.wait(10)
    eventually("still mapped", lambda: free_bytes(PEER_DEVICE) > before + GIB, seconds=10)


def test_what_is_read_from_a_dying_owner_is_right_until_reads_fail(bench: Bench) -> None:
    """Memory outlives its owner for as long as it is mapped: a read is right, or fails once the death is heard of."""
    for delay_s in (0.0, 0.003, 0.02):
        peer = bench.new_peer()
        peer.make(128, 256 << 10)
        reader = bench.reader(128, 256 << 10)
        link = reader.connect(peer)
        transfers = [link.read(reader.whole()) for _ in range(200)]
        transfers[0].wait(soon())
        time.sleep(delay_s)
        os.kill(peer.pid, signal.SIGKILL)
        reader.set(0)
        until = time.monotonic() + 10
        while right_or_failed(link.read(reader.whole()), reader, peer):
            assert time.monotonic() < until, "the death was never heard of"
        for _ in range(3):
            with pytest.raises(TransferError, match=r"gone"):
                link.read(reader.whole()).wait(soon())
        peer.process.wait(10)
    kept, again = bench.start()
    again.connect(kept).read(again.plan([3], [5])).wait(soon())
    check(kept, again, [3], [5])


def right_or_failed(transfer: Transfer, reader: Reader, peer: Peer) -> bool:
    """Whether the transfer was done, with the right bytes; False when it failed."""
    try:
        transfer.wait(soon())
    except TransferError:
        return False
    assert same(reader.memory.read_back(), peer.arrays)
    return True


def test_withdraw_waits_until_readers_have_unmapped(bench: Bench) -> None:
    peer = bench.peer
    peer.make(4096, 256 << 10)  # 2 GiB
    reader = bench.reader(64, 4096)
    link = reader.connect(peer)
    before = free_bytes(PEER_DEVICE)
    peer.ask("free")
    assert free_bytes(PEER_DEVICE) > before + GIB
    with pytest.raises(TransferError, match="withdrawn"):
        link.read(reader.plan([1], [1])).wait(soon())


def test_withdraw_goes_on_without_a_reader_that_is_stopped(bench: Bench) -> None:
    owner, stopped = bench.new_peer(), bench.new_peer()
    owner.make()
    stopped.make()
    bench.keep(lambda: os.kill(stopped.pid, signal.SIGCONT))
    handle = encode_handle(owner.handle)
    stopped.ask("start", handle=handle, sources=[1], targets=[2], times=1)
    os.kill(stopped.pid, signal.SIGSTOP)
    eventually("the reader was not stopped", lambda: state(stopped.pid) == "T")
    owner.ask("withdraw")
    owner.ask("register")
    os.kill(stopped.pid, signal.SIGCONT)
    stopped.ask("wait")  # its read had ended before; its link is lost


def test_a_write_without_a_grant_moves_nothing(bench: Bench) -> None:
    peer, reader = bench.start()
    reader.set(7)
    link = reader.connect(peer)
    with pytest.raises(TransferError, match="not_granted"):
        link.write(reader.plan([1], [2])).wait(soon())
    assert same(peer.content(), peer.arrays)
    peer.ask("allow", read=True, write=True)
    link.write(reader.plan([1], [2])).wait(soon())
    assert all((array[2] == 7).all() for array in peer.content())


def test_a_write_to_a_stopped_owner_can_be_cancelled_and_the_link_goes_on(bench: Bench) -> None:
    peer, reader = bench.start()
    peer.ask("allow", read=True, write=True)
    link = reader.connect(peer)
    bench.keep(lambda: os.kill(peer.pid, signal.SIGCONT))
    os.kill(peer.pid, signal.SIGSTOP)
    eventually("the peer was not stopped", lambda: state(peer.pid) == "T")
    transfers = [link.write(reader.plan([1], [block])) for block in range(3)]
    time.sleep(0.1)
    for transfer in transfers:
        transfer.cancel()
    os.kill(peer.pid, signal.SIGCONT)
    link.write(reader.plan([1], [9])).wait(soon())
    assert not any(array[9].any() for array in peer.content())
    link.read(reader.plan([3], [5])).wait(soon())
    check(peer, reader, [3], [5])


def test_what_a_peer_claims_is_checked_against_what_is_mapped(bench: Bench) -> None:
    peer, reader = bench.start()
    details = msgspec.msgpack.decode(peer.handle.details, type=CudaIpcDetails)
    exported = details.exported
    large = msgspec.structs.replace(peer.handle, region_bytes=tuple(1 << 40 for _ in peer.handle.region_bytes))
    with pytest.raises(LinkError, match="mapped"):
        reader.transport.connect(large, soon())
    for changed in (
        msgspec.structs.replace(exported, handles=(bytes(64),)),
        msgspec.structs.replace(exported, handles=(os.urandom(64),)),
        msgspec.structs.replace(exported, handles=()),
        msgspec.structs.replace(exported, nonce=bytes(32)),
        msgspec.structs.replace(exported, nonce_handle=bytes(64)),
        msgspec.structs.replace(exported, places=exported.places[:1]),
    ):
        claim = msgspec.msgpack.encode(msgspec.structs.replace(details, exported=changed))
        with pytest.raises(LinkError):
            reader.transport.connect(msgspec.structs.replace(peer.handle, details=claim), soon())
    elsewhere = msgspec.structs.replace(details, host="another/1")
    with pytest.raises(LinkError, match="another host"):
        reader.transport.connect(
            msgspec.structs.replace(peer.handle, details=msgspec.msgpack.encode(elsewhere)), soon()
        )
    reader.connect(peer).read(reader.plan([1], [1])).wait(soon())
    check(peer, reader, [1], [1])


def test_our_own_handle_is_refused(bench: Bench) -> None:
    one, two = bench.reader(), bench.reader()
    with pytest.raises(LinkError, match="this very process"):
        one.transport.connect(two.handle, soon())


def test_pools_that_it_cannot_share_are_refused(bench: Bench) -> None:
    reader = bench.reader()
    with pytest.raises(LinkError, match="CPU memory"):
        reader.transport.register(KVPool(()))
    array = np.zeros(4096, np.uint8)
    host = Region(int(array.ctypes.data), 4096, 4096, 4096, 1)
    with pytest.raises(LinkError):
        reader.transport.register(KVPool((host,), owner=array, cuda=OWN_DEVICE))
    region = reader.memory.pool.regions[0]
    beyond = Region(region.address, 1 << 40, 4096, 4096, 1)
    with pytest.raises(LinkError, match="expandable_segments:False"):
        reader.transport.register(KVPool((beyond,), cuda=OWN_DEVICE))
    if driver.device_count() > 1:
        with pytest.raises(LinkError, match="but the pool says"):
            reader.transport.register(KVPool((region,), cuda=1 - OWN_DEVICE))


def test_expandable_segments_are_refused_with_what_to_do() -> None:
    script = f"""
import torch
from tests.contract.cases import CASES
from tests.contract.fabric_peer import Owner, Setup
owner = Owner(Setup("cuda_ipc"))
try:
    owner.make(64, 1 << 20, 1)
except Exception as error:
    print(type(error).__name__, error)
assert torch.cuda.memory_stats({PEER_DEVICE})
"""
    env = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert run.stdout.startswith("LinkError"), run.stdout + run.stderr
    assert "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False" in run.stdout


def test_two_processes_of_which_each_sees_its_own_gpu_only(bench: Bench) -> None:
    """As vLLM instances are started: CUDA_VISIBLE_DEVICES differs, both call their GPU number 0."""
    if driver.device_count() < 2:
        pytest.skip("needs 2 CUDA devices")
    python = (sys.executable, "-m", "tests.gpu.first_device")
    one, two = (bench.new_peer(("env", f"CUDA_VISIBLE_DEVICES={device}", *python)) for device in (0, 1))
    read_from_one_another(one, two)


def test_two_processes_on_one_gpu(bench: Bench) -> None:
    read_from_one_another(bench.new_peer(), bench.new_peer())


def read_from_one_another(one: Peer, two: Peer) -> None:
    one.make(seed=1)
    two.make(seed=2)
    lower, upper = list(range(32)), list(range(32, 64))
    for asks, other in ((one, two), (two, one)):
        asks.ask("start", handle=encode_handle(other.handle), sources=lower, targets=upper, times=3)
        asks.ask("wait")
        for got, theirs in zip(asks.content(), other.arrays, strict=True):
            assert (got[upper] == theirs[lower]).all()
