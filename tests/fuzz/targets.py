"""Everything of the fabric that reads bytes from others: each decoder with valid samples and the errors it declares."""

from __future__ import annotations

import base64
import functools
import importlib
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from vllm_fleet.bench.mock_cache import MockCache
from vllm_fleet.connector.holder import Holder
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import AuthError, BadRequest, Corrupt, FleetError, LinkError
from vllm_fleet.core.ids import InstanceName
from vllm_fleet.fabric.contract import KVPool, Region
from vllm_fleet.fabric.endpoint import Endpoint
from vllm_fleet.fabric.owner import OwnedPool, Runs
from vllm_fleet.fabric.transports import load
from vllm_fleet.net import sockets
from vllm_fleet.net.channel import Credentials
from vllm_fleet.router.prefix.book import PrefixBook
from vllm_fleet.router.prefix.events import parse
from vllm_fleet.wire import auth, ticket
from vllm_fleet.wire import fabric as wire
from vllm_fleet.wire.auth import ClientHandshake, ServerHandshake
from vllm_fleet.wire.frames import FrameReader, encode_frame
from vllm_fleet.wire.names import DECODE_ERRORS

TOKEN = bytes(range(32))
EDGES = [bytes.fromhex(text) for text in ("00", "ff" * 8, "7f" + "ff" * 7, "80" + "00" * 7, "cfffffffffffffffff", "c1")]
EDGES += [
    b"\xdf\xff\xff\xff\xff",
    b"\xdd\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\x91" * 40,
]
"""Numbers at the ends of their ranges, and headers of containers that announce 4 GiB."""

DETAILS = {
    "cma": "cma:CmaDetails",
    "cuda_ipc": "cuda_ipc:CudaIpcDetails",
    "memory": "memory:MemoryDetails",
    "mooncake": "mooncake:MooncakeDetails",
    "nixl": "nixl_handle:NixlDetails",
    "tcp": "tcp:TcpDetails",
}


@dataclass(frozen=True)
class Target:
    """One reader of foreign bytes."""

    name: str
    samples: list[bytes]
    read: Callable[[bytes], object]
    declared: tuple[type[Exception], ...]
    weight: int = 1
    """Its share of the benchmark's inputs."""


def mutate(rng: random.Random, samples: list[bytes]) -> bytes:
    """A damaged sample: flipped bits, a cut, inserted or replaced bytes, two samples joined; sometimes pure garbage."""
    if rng.random() < 0.05:
        return rng.randbytes(rng.randrange(200))
    damaged = bytearray(rng.choice(samples))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(damaged) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(damaged):
            damaged[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(damaged):
            damaged[at] = rng.randrange(256)
        elif kind == 2:
            del damaged[at : at + rng.randrange(1, 9)]
        elif kind == 3:
            damaged[at:at] = rng.choice(EDGES)
        elif kind == 4:
            edge = rng.choice(EDGES)
            damaged[at : at + len(edge)] = edge
        else:
            other = rng.choice(samples)
            damaged[at:] = other[rng.randrange(len(other) + 1) :]
    return bytes(damaged)


def sample(kind: msgspec.inspect.Type, big: bool) -> Any:
    """A valid value of a message's field: one near its lower bounds, and a bigger one."""
    match kind:
        case msgspec.inspect.StructType():
            values = {field.encode_name: sample(field.type, big) for field in kind.fields}
            if kind.array_like:
                return list(values.values())
            return {kind.tag_field: kind.tag, **values} if kind.tag_field is not None else values
        case msgspec.inspect.IntType():
            return (kind.le if big else kind.ge) or 0
        case msgspec.inspect.StrType():
            if kind.pattern is not None:
                return "http://a:1" if "http" in kind.pattern else "a"
            return "é" * ((kind.max_length or 8) // 8) if big else "a" * (kind.min_length or 0)
        case msgspec.inspect.BytesType():
            low = kind.min_length or 0
            return b"\x01" * (min(low * 3, kind.max_length or 48) if big else low)
        case msgspec.inspect.VarTupleType() | msgspec.inspect.ListType():
            return [sample(kind.item_type, big)] * (max(kind.min_length or 0, 3) if big else (kind.min_length or 0))
        case msgspec.inspect.DictType():
            return {sample(kind.key_type, big): sample(kind.value_type, big)} if big else {}
        case msgspec.inspect.LiteralType():
            return kind.values[-1 if big else 0]
        case msgspec.inspect.UnionType():
            return sample(kind.types[0], big)
        case msgspec.inspect.BoolType():
            return big
        case msgspec.inspect.FloatType():
            return 0.5
        case msgspec.inspect.NoneType():
            return None
    raise AssertionError(f"no sample of {kind}")


def samples_of(message: Any) -> list[bytes]:
    """Encoded samples of a message type, or of each type of a union; all of them decode."""
    kind = msgspec.inspect.type_info(message)
    kinds = kind.types if isinstance(kind, msgspec.inspect.UnionType) else (kind,)
    encoded = [msgspec.msgpack.encode(sample(each, big)) for each in kinds for big in (False, True)]
    decode = msgspec.msgpack.Decoder(message).decode
    for each in encoded:
        decode(each)
    return encoded


def codecs() -> list[Target]:
    """The decoders: pure functions of bytes."""
    handle = msgspec.msgpack.Decoder(wire.PoolHandle).decode
    tickets = samples_of(ticket.Ticket | ticket.StreamTicket)
    targets = [
        Target("questions", samples_of(wire.Question), wire.decode_question, DECODE_ERRORS, 4),
        Target("answers", samples_of(wire.Answer), wire.decode_answer, DECODE_ERRORS, 4),
        Target("pool handles", samples_of(wire.PoolHandle), handle, DECODE_ERRORS),
        Target("frames", [encode_frame(b"abc") * 3, encode_frame(bytes(64))], _frames, (Corrupt,)),
        Target("handshake, server", _client_messages(), _server, (AuthError,), 2),
        Target("handshake, client", _server_messages(), _client, (AuthError, LinkError), 2),
        Target("tickets", [_seal(body).encode() for body in tickets], _ticket, (BadRequest, AuthError)),
        Target("tickets, signed", tickets, _signed_ticket, (BadRequest,)),
        Target("KV events", _kv_events(), _take_kv_events, (Corrupt,), 2),
    ]
    for name, place in DETAILS.items():
        module, _, attribute = place.partition(":")
        details = getattr(importlib.import_module(f"vllm_fleet.fabric.transports.{module}"), attribute)
        read = msgspec.msgpack.Decoder(details).decode
        targets.append(Target(f"details, {name}", samples_of(details), read, DECODE_ERRORS))
    return targets


def _frames(received: bytes) -> None:
    reader = FrameReader(4096)
    for start in range(0, len(received), 7):
        reader.feed(received[start : start + 7])
        assert reader.pending_bytes <= 4 + 4096


def _client_messages() -> list[bytes]:
    client, server = ClientHandshake(TOKEN, "f"), ServerHandshake(TOKEN, "f")
    hello = client.start()
    proof = client.receive(server.receive(hello))
    assert proof is not None
    return [hello, proof]


def _server_messages() -> list[bytes]:
    client, server = ClientHandshake(TOKEN, "f"), ServerHandshake(TOKEN, "f")
    answer = server.receive(client.start())
    proof = client.receive(answer)
    assert proof is not None
    return [answer, server.receive(proof), *samples_of(auth.Refused)]


def _server(received: bytes) -> None:
    second = ServerHandshake(TOKEN, "f")
    second.receive(ClientHandshake(TOKEN, "f").start())
    try:
        ServerHandshake(TOKEN, "f").receive(received)
    finally:
        try:
            second.receive(received)
        except AuthError:
            assert not second.done


def _client(received: bytes) -> None:
    client = ClientHandshake(TOKEN, "f")
    client.start()
    try:
        client.receive(received)
    finally:
        assert not client.done, "a damaged answer finished the handshake"


def _ticket(received: bytes) -> None:
    ticket.unseal(received.decode("latin-1"), TOKEN)


def _signed_ticket(received: bytes) -> None:
    ticket.unseal(_seal(received), TOKEN)


def _seal(body: bytes) -> str:
    return base64.urlsafe_b64encode(ticket._mac(TOKEN, body) + body).decode()


class Owned:
    """A registered pool in this process: what questions about it, and damaged handles of it, may do."""

    def __init__(self) -> None:
        self.array = np.zeros((2, 4096), np.uint8)
        regions = tuple(Region(int(row.ctypes.data), 4096, 64, 64, 64) for row in self.array)
        self.pool = KVPool(regions, owner=self.array)
        self.endpoint = Endpoint(sockets.listen("127.0.0.1", 0, setting="test"), Credentials("f", TOKEN))
        self.endpoint.allow_write = lambda grant, regions, offsets, nbytes: True
        self.owned = OwnedPool(self.endpoint)
        self.id = self.owned.register(self.pool)
        self.transports = {name: load(name)(self.endpoint) for name in ("cma", "memory", "tcp")}
        self.handles = {name: transport.register(self.pool) for name, transport in self.transports.items()}
        self.holder = Holder(self.endpoint, threading.Condition(), lease_s=30.0, hold_s=60.0)
        self.holder.use_pool(self.pool)
        self.endpoint.start()

    def targets(self) -> list[Target]:
        """Checks of runs, and connecting with damaged details (not of tcp: that would dial anybody)."""
        triples = np.array([[0, 0, 64], [1, 4032, 64], [0, 4095, 1]], "<i8")
        targets = [Target("runs", [triples.tobytes(), triples[:1].tobytes()], self._runs, (Corrupt,), 2)]
        for name in ("cma", "memory"):
            details = self.handles[name].details
            read = functools.partial(self._connect, name)
            targets.append(Target(f"connect, {name}", [details], read, (LinkError,)))
        return targets

    def _runs(self, received: bytes) -> None:
        found = self.owned.check(self.id, "g", received)
        if isinstance(found, Runs):
            base = int(self.array.ctypes.data)
            assert bool((found.addresses >= base).all())
            assert bool((found.addresses + found.nbytes <= base + self.array.nbytes).all())

    def _connect(self, name: str, received: bytes) -> None:
        handle = msgspec.structs.replace(self.handles[name], details=received)
        self.transports[name].connect(handle, Deadline.after(5, "test")).close()

    def close(self) -> None:
        for transport in self.transports.values():
            transport.close()
        self.owned.withdraw()
        self.endpoint.close()


def feed(target: Target, received: bytes) -> str:
    """Give one input to a target; the name of the declared error, or "taken". Any other error is raised."""
    try:
        target.read(received)
    except target.declared as error:
        return type(error).__name__
    except (FleetError, ArithmeticError, LookupError, TypeError) as error:
        raise AssertionError(f"{target.name}: {type(error).__name__} for {received.hex()}") from error
    return "taken"


def _kv_events() -> list[bytes]:
    """What an instance publishes that stores, evicts and is reset."""
    cache = MockCache(3, 4)
    cache.end(cache.begin(b"x" * 48, "label"))
    cache.end(cache.begin(b"y" * 48))
    cache.clear()
    each = [msgspec.msgpack.encode([0.0, [event], 0]) for event in cache.events]
    return [*each, msgspec.msgpack.encode([0.0, cache.events, 0])]


def _take_kv_events(payload: bytes) -> None:
    """Decoded and taken: nothing that decodes may be more than the router can take."""
    book = PrefixBook("r", blocks_max=1000)
    for _ in range(2):
        book.take(InstanceName("a"), parse(payload))
