"""Both sides of a load inside one process: a prefill worker and a decode worker with small pools in CPU memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from tests.contract.pools import Bytes, CpuMemory, pattern
from vllm_fleet.connector.dial import Self
from vllm_fleet.connector.holder import Holder
from vllm_fleet.connector.intake import Ended, PeerLoad
from vllm_fleet.connector.jobs import GrowJob, HoldJob
from vllm_fleet.connector.peer import Peer
from vllm_fleet.fabric import integrity
from vllm_fleet.fabric.endpoint import Endpoint, Handler
from vllm_fleet.fabric.integrity import Mode
from vllm_fleet.fabric.plan import Slices
from vllm_fleet.fabric.select import LinkSelector, register_all
from vllm_fleet.net import sockets
from vllm_fleet.net.channel import Channel, Credentials
from vllm_fleet.wire import fabric as wire
from vllm_fleet.wire.ticket import WorkerAddress

CREDENTIALS = Credentials("test", bytes(32))
PROMPT = b"p" * 32
ENGINE = "engine"
TOKENS = 4
"""Of a block."""

SOON_S = 5.0
LAYOUT = {"dtype": "bf16"}


def eventually(
    what: str, condition: Callable[[], bool], seconds: float = SOON_S, details: Callable[[], object] = lambda: ""
) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"{what} {details()}"
        time.sleep(0.001)


class Watched(Endpoint):
    """An endpoint that remembers what it has been asked, and answered."""

    def __init__(self, port: int = 0) -> None:
        self.questions: list[wire.Question] = []
        self.before: dict[type, Callable[[], None]] = {}
        """Called before a question of this type is answered."""
        super().__init__(sockets.listen("127.0.0.1", port, setting="test"), CREDENTIALS)

    def handle(self, question: type, handler: Handler) -> None:
        def remember(channel: Channel, asked: wire.Question) -> wire.Answer | None:
            self.before.get(question, lambda: None)()
            answer = handler(channel, asked)
            self.questions.append(asked)
            return answer

        super().handle(question, remember)


class Prefill:
    """One prefill worker; what it computes are random bytes, the same for equal seeds."""

    def __init__(
        self,
        transport: str = "memory",
        *,
        blocks: int = 32,
        block_bytes: int = 64,
        engine: str = ENGINE,
        seed: int = 1,
        port: int = 0,
    ) -> None:
        self.wanted: list[Bytes] = pattern(blocks, block_bytes, seed)
        """What the KV of each block is, once it is computed; zeros until then."""
        self._now: list[Bytes] = [np.zeros_like(array) for array in self.wanted]
        self._memory = CpuMemory(blocks, block_bytes)
        self.changed = threading.Condition()
        self.endpoint = Watched(port)
        self.holder = Holder(self.endpoint, self.changed, lease_s=30.0, hold_s=60.0)
        self.holder.use_pool(self._memory.pool)
        self.endpoint.allow_read = self.holder.grants
        integrity.serve(self.endpoint)
        self._transports, handles = register_all((transport,), self.endpoint, self._memory.pool)
        shapes = tuple(wire.Shape(r.block_bytes, r.block_stride, r.blocks) for r in self._memory.pool.regions)
        described = wire.Description(engine, 0, 1, LAYOUT, shapes, handles)
        self.endpoint.handle(wire.Describe, lambda channel, question: described)
        self.endpoint.start()
        self.address = WorkerAddress(self.endpoint.host, self.endpoint.port)
        self.engine = engine
        self.requests: set[str] = set()
        """Whose blocks the engine may free."""

    def step(self, transfer: str, blocks: tuple[int, ...], ready: int) -> None:
        """One step of a running request: its blocks get their KV, and it is told."""
        job = GrowJob(transfer, transfer, PROMPT, blocks, ready)
        self.holder.begin([job], [], [])
        self._compute(blocks)
        self.holder.publish([job])

    def hold(self, transfer: str, blocks: tuple[int, ...], tokens: int) -> None:
        """The request has finished."""
        self._compute(blocks)
        self.holder.begin([], [], [HoldJob(transfer, transfer, PROMPT, blocks, tokens)])

    def revoke(self, transfer: str) -> None:
        self.holder.begin([], [transfer], [])

    def asked(self, question: wire.Question | type, count: int = 1) -> None:
        """Wait until a question, or so many of a type, were answered."""

        def found() -> bool:
            return sum(q == question or type(q) is question for q in list(self.endpoint.questions)) >= count

        eventually(f"nobody asked {question}:", found, details=lambda: self.endpoint.questions)

    def ended(self, *requests: str) -> None:
        """Wait until the pins of exactly these requests have ended."""

        def all_ended() -> bool:
            self.requests |= self.holder.take_ended()
            return self.requests >= set(requests)

        eventually(f"{requests} did not end:", all_ended, details=lambda: self.requests)
        assert self.requests == set(requests)

    def close(self) -> None:
        for transport in self._transports.values():
            transport.close()
        self.endpoint.close()

    def _compute(self, blocks: tuple[int, ...]) -> None:
        for array, wanted in zip(self._now, self.wanted, strict=True):
            array[list(blocks)] = wanted[list(blocks)]
        self._memory.fill(self._now)


class Decode:
    """One decode worker, but for what loads."""

    def __init__(
        self,
        transport: str = "memory",
        *,
        blocks: int = 32,
        block_bytes: int = 64,
        layout: dict[str, str] | None = None,
        checksums: Mode = "full",
    ) -> None:
        self._endpoint = Watched()
        self._memory = CpuMemory(blocks, block_bytes)
        self._transports, _ = register_all((transport,), self._endpoint, self._memory.pool)
        self._endpoint.start()
        selector = LinkSelector(self._transports)
        self.own = Self(CREDENTIALS, selector, self._memory.pool, LAYOUT if layout is None else layout, checksums)
        self.results: list[Ended] = []

    def ended(self, result: Ended) -> None:
        """What a Peer reports to."""
        self.results.append(result)

    def wait(self, count: int = 1, seconds: float = SOON_S) -> list[Ended]:
        """The ends of exactly so many loads."""
        eventually(f"{count} loads did not end:", lambda: len(self.results) >= count, seconds, lambda: self.results)
        assert len(self.results) == count
        return self.results

    def one(self) -> Ended:
        """The only end."""
        [result] = self.wait(1)
        return result

    def read_back(self) -> list[Bytes]:
        return self._memory.read_back()

    def has(self, prefill: Prefill, theirs: tuple[int, ...], ours: tuple[int, ...]) -> bool:
        """Whether our blocks hold what theirs are to hold."""
        pairs = zip(self.read_back(), prefill.wanted, strict=True)
        return all(bool((got[list(ours)] == wanted[list(theirs)]).all()) for got, wanted in pairs)

    def used(self) -> NDArray[np.int64]:
        """The blocks that anything was written to."""
        return np.flatnonzero(sum(array.any(axis=1).astype(int) for array in self.read_back()))

    def close(self) -> None:
        for transport in self._transports.values():
            transport.close()
        self._endpoint.close()


def a_load(
    transfer: str = "t",
    *,
    tokens: int = 16,
    blocks: tuple[int, ...] = (20, 21, 22, 23),
    skip: int = 0,
    streamed: bool = True,
    engine: str = ENGINE,
    prompt: bytes = PROMPT,
    request: str | None = None,
    reader: int = 0,
    readers: int = 1,
    cut: Slices | None = None,
) -> PeerLoad:
    """A load of four blocks."""
    name = transfer if request is None else request
    return PeerLoad(name, transfer, engine, prompt, tokens, TOKENS, blocks, skip, streamed, reader, readers, cut)


class Closable(Protocol):
    def close(self) -> None: ...


Kept = TypeVar("Kept", bound=Closable)


class Stage:
    """What a test makes; everything is closed when it ends, and no thread of it is left."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def keep(self, made: Kept) -> Kept:
        self._stack.callback(made.close)
        return made

    def peer(self, prefill: Prefill, decode: Decode, *, load_s: float = SOON_S, prefill_s: float = 60.0) -> Peer:
        """The prefill worker as the decode worker sees it."""
        return self.keep(Peer(prefill.address, decode.own, decode.ended, load_s=load_s, prefill_s=prefill_s))

    def close(self) -> None:
        self._stack.close()
        eventually("a thread was left behind", lambda: not [t for t in threading.enumerate() if _is_ours(t.name)])


def _is_ours(name: str) -> bool:
    return name.startswith(("fleet-load-", "fleet-hear-", "fleet-memory-", "fleet-tcp-", "fleet-cma-"))
