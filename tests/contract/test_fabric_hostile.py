"""Peers that hold the token and lie: at the owner's endpoint, and as an owner towards a reader."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from typing import Literal

import msgspec
import pytest

from tests.contract.cases import CASES
from tests.contract.harness import TOKEN, Bench, Reader, check, same
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import Corrupt, FleetError, LinkError
from vllm_fleet.fabric.contract import TransferError
from vllm_fleet.fabric.endpoint import Endpoint
from vllm_fleet.fabric.owner import OwnedPool
from vllm_fleet.fabric.transports.tcp import TcpDetails
from vllm_fleet.net import sockets
from vllm_fleet.net.channel import Channel, Credentials, connect
from vllm_fleet.wire import fabric as wire

pytestmark = pytest.mark.timeout(30)
HUGE = 2**63 - 1
REGION = 64 * 4096


def soon() -> Deadline:
    return Deadline.after(10, "test")


def runs(*triples: tuple[int, int, int]) -> bytes:
    return b"".join(struct.pack("<qqq", *triple) for triple in triples)


OUTSIDE = {
    "after the end": runs((0, REGION, 1)),
    "over the end": runs((0, REGION - 1, 2)),
    "a good one first": runs((0, 0, 64), (1, REGION - 63, 64)),
    "region after the last": runs((2, 0, 1)),
    "region -1": runs((-1, 0, 1)),
    "region -2^63": runs((-(2**63), 0, 1)),
    "huge region": runs((HUGE, 0, 1)),
    "offset -1": runs((0, -1, 2)),
    "offset -2^63": runs((0, -(2**63), HUGE)),
    "offset + length wraps": runs((0, HUGE, 24)),
    "offset + length wraps to 0": runs((0, 1, HUGE)),
    "both wrap": runs((0, HUGE, HUGE)),
    "no length": runs((0, 0, 0)),
    "length -1": runs((0, 64, -1)),
    "length -2^63": runs((0, 0, -(2**63))),
    "sum of lengths wraps": runs(*[(0, 0, 2**62)] * 5),
}


def dial(port: int) -> Channel:
    return connect("127.0.0.1", port, Credentials("test", TOKEN), soon())


def answer(channel: Channel, question: wire.Question) -> wire.Answer:
    channel.send(wire.encode(question), soon())
    got: wire.Answer = wire.decode_answer(channel.receive(soon()))
    return got


def test_runs_outside_the_pool_are_denied(bench: Bench) -> None:
    bench.peer.make()
    bench.peer.ask("allow", read=True, write=True)
    pool = bench.peer.handle.pool
    with contextlib.closing(dial(bench.peer.port)) as channel:
        for name, encoded in OUTSIDE.items():
            for kind in (wire.Read, wire.Write, wire.Digest):
                got = answer(channel, kind("grant", pool, encoded))
                assert isinstance(got, wire.Denied), name
                assert got.reason in ("out_of_range", "unsupported", "stale_pool"), name
                assert answer(channel, wire.Ping()) == wire.Pong(), name
    assert same(bench.peer.content(), bench.peer.arrays)


def test_nonsense_ends_its_connection_and_nothing_else(bench: Bench) -> None:
    peer, reader = bench.start()
    link = reader.connect(peer)
    pool = peer.handle.pool
    good = wire.encode(wire.Read("grant", pool, runs((0, 0, 64))))
    for payload in (
        b"",
        b"\xc1",
        good[:-1],
        b"\x91" * 100_000,
        wire.encode(wire.Read("grant", pool, bytes(23))),
        wire.encode(wire.Read("grant", pool, b"")),
        wire.encode(wire.Read("", pool, bytes(24))),
        wire.encode(wire.Probe("p" * 300)),
        msgspec.msgpack.encode({"type": "added_later"}),
        wire.encode(wire.Pong()),
        wire.encode(wire.Read("grant", pool, bytes(wire.RUN_BYTES * 70_000))),
    ):
        with contextlib.closing(dial(peer.port)) as channel:
            channel.send(payload, soon())
            with pytest.raises(FleetError):
                channel.receive(soon())
    odd = wire.encode(wire.Read("grant", pool, bytes(25)))  # no whole number of runs: refused, or no question at all
    with contextlib.closing(dial(peer.port)) as channel:
        channel.send(odd, soon())
        with contextlib.suppress(FleetError):
            assert isinstance(wire.decode_answer(channel.receive(soon())), wire.Denied)
    link.read(reader.plan([1], [1])).wait(soon())
    check(peer, reader, [1], [1])


def test_an_announced_frame_that_is_too_long_is_not_awaited(bench: Bench) -> None:
    bench.peer.make()
    with contextlib.closing(dial(bench.peer.port)) as channel:
        channel.socket.sendall(struct.pack(">I", 2**32 - 1) + b"x")
        with pytest.raises(FleetError):
            channel.receive(soon())
    with contextlib.closing(dial(bench.peer.port)) as channel:
        assert answer(channel, wire.Ping()) == wire.Pong()


Lie = Callable[[Channel, wire.Read], wire.Answer | None]


def _raw(*parts: bytes | wire.Answer | Literal["close"]) -> Lie:
    """Send these frames (answers) and bytes (raw), or close, whatever was asked."""

    def tell(channel: Channel, question: wire.Read) -> None:
        for part in parts:
            if isinstance(part, bytes):
                channel.socket.sendall(part)
            elif isinstance(part, str):
                channel.abort()
            else:
                channel.send(wire.encode(part), soon())

    return tell


LIES: dict[str, Lie] = {
    "fewer bytes": lambda channel, question: wire.Reading(4095),
    "more bytes": lambda channel, question: wire.Reading(4097),
    "another answer": lambda channel, question: wire.Pong(),
    "no answer at all": _raw(struct.pack(">I", 3) + b"\xc1\xc1\xc1"),
    "a frame of 4 GiB": _raw(struct.pack(">I", 2**32 - 1)),
    "not moved": _raw(wire.Reading(4096), bytes(4096), wire.Denied("stale_pool")),
    "moved less": _raw(wire.Reading(4096), bytes(4096), wire.Moved(1)),
    "more than announced": _raw(wire.Reading(4096), bytes(8192), wire.Moved(4096)),
    "closed in the middle": _raw(wire.Reading(4096), bytes(100), "close"),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_an_owner_that_lies_gets_an_error_and_no_byte_out_of_the_plan(lie: Lie) -> None:
    with contextlib.ExitStack() as stack:
        owner = Endpoint(sockets.listen("127.0.0.1", 0, setting="test"), Credentials("test", TOKEN))
        stack.callback(owner.close)
        reader = Reader(CASES["tcp"], 4, 4096)
        stack.callback(reader.close)
        pool = OwnedPool(owner).register(reader.memory.pool)
        owner.handle(wire.Read, lie)  # type: ignore[arg-type]
        owner.start()
        details = msgspec.msgpack.encode(TcpDetails("127.0.0.1", owner.port))
        handle = wire.PoolHandle("tcp", pool, reader.memory.pool.sizes, details)
        link = reader.transport.connect(handle, soon())
        plan = reader.plan([1], [1])
        with pytest.raises((TransferError, Corrupt)):
            link.read(type(plan)("g", plan.region[:1], plan.source[:1], plan.target[:1], plan.nbytes[:1])).wait(soon())
        reader.set(0)
        assert reader.holds(0)


def test_a_handle_that_lies_about_its_sizes_is_denied_by_the_owner(bench: Bench) -> None:
    if not bench.case.proxied and not bench.case.one_process:
        pytest.skip(f"{bench.case.name}: the kernel or the library checks the owner's memory, not the owner")
    peer, reader = bench.start()
    big = bench.reader(256, 4096)
    handle = msgspec.structs.replace(peer.handle, region_bytes=(256 * 4096,) * 2)

    def use() -> None:
        big.transport.connect(handle, soon()).read(big.plan([200], [1])).wait(soon())

    with pytest.raises((TransferError, LinkError), match=r"out_of_range|inconsistent"):
        use()
    assert big.holds(0)
    reader.connect(peer).read(reader.plan([1], [1])).wait(soon())
    check(peer, reader, [1], [1])
