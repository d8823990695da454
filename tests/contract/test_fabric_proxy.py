"""A bad network between two workers, in user space: delay, cuts, resets, single bytes."""

from __future__ import annotations

import time

import msgspec
import pytest

from tests.contract.harness import Bench, Peer, Reader, check, eventually, same
from tests.contract.proxy import Proxy
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import LinkError
from vllm_fleet.fabric.contract import TransferError
from vllm_fleet.fabric.transports.tcp import TcpDetails

pytestmark = pytest.mark.timeout(30)


def soon() -> Deadline:
    return Deadline.after(20, "test")


def behind_proxy(bench: Bench, blocks: int = 64, block_bytes: int = 4096) -> tuple[Peer, Reader, Proxy]:
    """Both sides, and a proxy that the peer's handle now leads through."""
    if not bench.case.proxied:
        pytest.skip(f"{bench.case.name}: does not run over one TCP connection to the handle's port")
    peer, reader = bench.start(blocks, block_bytes)
    proxy = Proxy(peer.port)
    bench.keep(proxy.close)
    details = msgspec.msgpack.encode(TcpDetails("127.0.0.1", proxy.port))
    peer.handle = msgspec.structs.replace(peer.handle, details=details)
    return peer, reader, proxy


@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
def test_twenty_milliseconds_of_delay(bench: Bench, write: bool) -> None:
    peer, reader, proxy = behind_proxy(bench, 64, 16 << 10)
    peer.ask("allow", read=True, write=True)
    proxy.conduct.delay_s = 0.02
    link = reader.connect(peer)
    transfers = [(link.write if write else link.read)(reader.whole()) for _ in range(3)]
    for transfer in transfers:
        transfer.wait(soon())
    if write:
        assert not any(array.any() for array in peer.content())
    else:
        assert same(reader.memory.read_back(), peer.arrays)
    assert proxy.counts.connections == 1
    assert min(proxy.counts.delayed_s) >= 0.02


@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
def test_one_byte_at_a_time(bench: Bench, write: bool) -> None:
    peer, reader, proxy = behind_proxy(bench, 64, 64)
    peer.ask("allow", read=True, write=True)
    proxy.conduct.chunk_bytes = 1
    link = reader.connect(peer)
    (link.write if write else link.read)(reader.whole()).wait(soon())
    if write:
        assert not any(array.any() for array in peer.content())
    else:
        assert same(reader.memory.read_back(), peer.arrays)
    moved = proxy.counts.up_bytes + proxy.counts.down_bytes
    assert moved >= 2 * 64 * 64
    assert proxy.counts.chunks == moved


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_connection_cut_in_the_middle(bench: Bench, reset: bool) -> None:
    peer, reader, proxy = behind_proxy(bench, 64, 64 << 10)
    link = reader.connect(peer)
    proxy.conduct.reset = reset
    proxy.conduct.cut_after_bytes = proxy.counts.down_bytes + (3 << 20)
    with pytest.raises(TransferError, match=r"closed|broke"):
        link.read(reader.whole()).wait(soon())
    assert proxy.counts.cuts == 1
    assert proxy.counts.down_bytes > 2 << 20
    proxy.conduct.cut_after_bytes = None
    link.read(reader.whole()).wait(soon())  # the link is made again
    assert proxy.counts.connections == 2
    assert same(reader.memory.read_back(), peer.arrays)


def test_a_connection_cut_in_the_handshake(bench: Bench) -> None:
    peer, reader, proxy = behind_proxy(bench)
    for nbytes in (0, 3, 20, 60):
        proxy.counts.down_bytes, proxy.counts.cuts = 0, 0
        proxy.conduct.cut_after_bytes = nbytes
        proxy.conduct.chunk_bytes = 1
        with pytest.raises(LinkError):
            reader.connect(peer)
        eventually("the proxy did not cut", lambda: proxy.counts.cuts >= 1)
        assert proxy.counts.down_bytes == nbytes
    proxy.conduct.cut_after_bytes, proxy.conduct.chunk_bytes = None, 1024
    reader.connect(peer).read(reader.plan([1], [1])).wait(soon())
    check(peer, reader, [1], [1])


def test_cancel_behind_a_slow_proxy_writes_nothing_more(bench: Bench) -> None:
    peer, reader, proxy = behind_proxy(bench, 64, 64 << 10)
    proxy.conduct.delay_s = 0.05
    link = reader.connect(peer)
    before = proxy.counts.down_bytes
    transfer = link.read(reader.whole())
    eventually("nothing moved", lambda: proxy.counts.down_bytes > before)
    transfer.cancel()
    reader.set(7)
    time.sleep(0.2)  # what was under way has arrived somewhere by now
    assert reader.holds(7)
    link.read(reader.whole()).wait(soon())
    assert same(reader.memory.read_back(), peer.arrays)
