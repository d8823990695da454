"""Both sides of a fabric test: peers as processes of their own (kept and used again), and this process's side."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tests.contract.cases import Case
from tests.contract.fabric_peer import Owner, Setup, decode_handle
from tests.contract.pools import REGIONS, Bytes, constant, make_memory, pattern
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.fabric.contract import Link, Transport
from vllm_fleet.fabric.endpoint import Endpoint
from vllm_fleet.fabric.plan import BlockCopyPlan, BlockShape, plan_blocks
from vllm_fleet.net import sockets
from vllm_fleet.net.channel import Credentials

ROOT = Path(__file__).parents[2]
TOKEN = bytes(32)


class PeerError(Exception):
    """The peer's own FleetError, as text."""


class Peer:
    """The other side, as a process of its own; ``prefix`` goes before its command."""

    _unheard = 0

    def __init__(self, setup: Setup, prefix: tuple[str, ...] = ()) -> None:
        command = [*prefix, sys.executable, "-m", "tests.contract.fabric_peer", msgspec.json.encode(setup).decode()]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            self.port = int(self._answer())
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self.process.pid

    def make(self, blocks: int = 64, block_bytes: int = 4096, seed: int = 1) -> None:
        """Let it register new memory of random bytes; ``handle`` and ``arrays`` (what it holds) tell of it."""
        self.handle = decode_handle(self.ask("make", blocks=blocks, block_bytes=block_bytes, seed=seed))
        self.blocks, self.block_bytes = blocks, block_bytes
        self.arrays = pattern(blocks, block_bytes, seed)

    def ask(self, command: str, **arguments: Any) -> Any:
        """One command of fabric_peer.Owner; its answer."""
        while self._unheard:
            self.hear()
        self.tell(command, **arguments)
        return self.hear()

    def tell(self, command: str, **arguments: Any) -> None:
        """The command alone; hear() gives its answer."""
        assert self.process.stdin is not None
        self._unheard += 1
        self.process.stdin.write(json.dumps({"do": command, **arguments}) + "\n")
        self.process.stdin.flush()

    def hear(self) -> Any:
        self._unheard -= 1
        return self._answer()

    def content(self) -> list[Bytes]:
        """What its memory holds now."""
        shape = (self.blocks, self.block_bytes)
        return [np.frombuffer(base64.b64decode(text), np.uint8).reshape(shape) for text in self.ask("content")]

    def alive(self) -> bool:
        return self.process.poll() is None

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the peer has ended; its own words are on standard error"
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer["ok"]

    def close(self) -> None:
        if self.alive():
            self.process.kill()
        self.process.wait(10)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


class LocalPeer(Peer):
    """The other side inside this process, for a transport that reaches no other."""

    def __init__(self, setup: Setup) -> None:
        self._owner = Owner(setup)
        self._answers: list[Any] = []
        self.port = self._owner.endpoint.port

    @property
    def pid(self) -> int:
        return os.getpid()

    def tell(self, command: str, **arguments: Any) -> None:
        self._unheard += 1
        self._answers.append(self._owner.do(command, **arguments))

    def _answer(self) -> Any:
        return self._answers.pop(0)

    def alive(self) -> bool:
        return True

    def close(self) -> None:
        self._owner.close()


class Peers:
    """Peers kept for the session: starting one takes longer than most tests."""

    def __init__(self) -> None:
        self._peers: dict[str, Peer] = {}

    def get(self, case: Case) -> Peer:
        """A peer of this case that is alive."""
        peer = self._peers.get(case.name)
        if peer is not None and not peer.alive():
            peer.close()
            peer = None
        if peer is None:
            setup = Setup(case.name)
            peer = self._peers[case.name] = LocalPeer(setup) if case.one_process else Peer(setup)
            if case.settles:
                peer.make(4, 64)
                peer.ask("free")
                Reader(case, 4, 64).close()
        return peer

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()


class Reader:
    """This process's side: a pool of zeros and a transport."""

    def __init__(
        self, case: Case, blocks: int, block_bytes: int, host: str = "127.0.0.1", token: bytes = TOKEN
    ) -> None:
        self.endpoint = Endpoint(sockets.listen(host, 0, setting="test"), Credentials("test", token))
        self.transport: Transport = case.factory()(self.endpoint)
        self.memory = make_memory(blocks, block_bytes, cuda=case.device(peer=False))
        self.handle = self.transport.register(self.memory.pool)
        self.endpoint.start()
        self.blocks, self.block_bytes = blocks, block_bytes
        self.shapes = [BlockShape(block_bytes, block_bytes, blocks)] * REGIONS

    def connect(self, peer: Peer) -> Link:
        return self.transport.connect(peer.handle, Deadline.after(10, "test"))

    def plan(self, sources: list[int], targets: list[int]) -> BlockCopyPlan:
        return plan_blocks(self.shapes, sources, targets, "grant")

    def whole(self) -> BlockCopyPlan:
        """All blocks, each to its own place, as many runs."""
        order = np.random.default_rng(0).permutation(self.blocks).tolist()
        return self.plan(order, order)

    def set(self, value: int) -> None:
        self.memory.fill(constant(self.blocks, self.block_bytes, value))

    def holds(self, value: int) -> bool:
        return all(bool((array == value).all()) for array in self.memory.read_back())

    def close(self) -> None:
        self.transport.close()
        self.endpoint.close()


class Bench:
    """A peer and what a test makes around it; everything is closed when the test ends."""

    def __init__(self, case: Case, peer: Peer, stack: ExitStack) -> None:
        self.case, self.peer, self._stack = case, peer, stack

    def start(self, blocks: int = 64, block_bytes: int = 4096, seed: int = 1) -> tuple[Peer, Reader]:
        """The kept peer with new memory, and a reader."""
        self.peer.make(blocks, block_bytes, seed)
        return self.peer, self.reader(blocks, block_bytes)

    def reader(self, blocks: int = 64, block_bytes: int = 4096, **more: Any) -> Reader:
        reader = Reader(self.case, blocks, block_bytes, **more)
        self._stack.callback(reader.close)
        return reader

    def new_peer(self, prefix: tuple[str, ...] = (), **setup: Any) -> Peer:
        """A peer of this test's own."""
        made = Setup(self.case.name, **setup)
        peer = LocalPeer(made) if self.case.one_process else Peer(made, prefix)
        self._stack.callback(peer.close)
        return peer

    def keep(self, close: Callable[[], object]) -> None:
        self._stack.callback(close)


def check(peer: Peer, reader: Reader, sources: list[int], targets: list[int]) -> None:
    """The blocks have arrived, and nothing else was written to the reader's pool of zeros."""
    got = reader.memory.read_back()
    for region in range(REGIONS):
        assert (got[region][targets] == peer.arrays[region][sources]).all()
        untouched = np.setdiff1d(np.arange(peer.blocks), targets)
        assert not got[region][untouched].any(), "bytes outside the plan were written"


def same(got: list[Bytes], wanted: list[Bytes]) -> bool:
    return all(bool((a == b).all()) for a, b in zip(got, wanted, strict=True))


def eventually(
    what: str, condition: Callable[[], bool], seconds: float = 5.0, details: Callable[[], object] = lambda: ""
) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"{what} {details()}"
        time.sleep(0.005)


def counts() -> tuple[int, int]:
    """Threads and file descriptors of this process."""
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


def files(pid: int | str = "self") -> dict[str, str]:
    """The open files of a process: what each descriptor is."""
    found = {}
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            found[number] = os.readlink(f"/proc/{pid}/fd/{number}")
    return found


def state(pid: int) -> str:
    """The state letter of a process: T is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
