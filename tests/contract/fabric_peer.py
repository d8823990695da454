"""The other side of a fabric test: owns memory and a transport, and does what it is told.

As a process of its own (python -m tests.contract.fabric_peer SETUP_JSON) it takes one JSON command per line on stdin
and answers each with one line; in a test of a transport of one process it is used as an object.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import threading
from typing import Any

import msgspec
import numpy as np

from tests.contract.cases import CASES
from tests.contract.pools import REGIONS, Memory, constant, make_memory, pattern
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import FleetError
from vllm_fleet.fabric.contract import Link, Transfer, TransferCancelledError
from vllm_fleet.fabric.endpoint import Endpoint
from vllm_fleet.fabric.plan import BlockShape, plan_blocks
from vllm_fleet.net import sockets
from vllm_fleet.net.channel import Credentials
from vllm_fleet.wire.fabric import PoolHandle


class Setup(msgspec.Struct, frozen=True):
    """What a peer is made of."""

    case: str
    host: str = "127.0.0.1"
    port: int = 0
    token: bytes = bytes(32)


class Owner:
    """Memory, endpoint and transport of one side."""

    def __init__(self, setup: Setup) -> None:
        self.case = CASES[setup.case]
        listener = sockets.listen(setup.host, setup.port, setting="test")
        self.endpoint = Endpoint(listener, Credentials("test", setup.token))
        self.transport = self.case.factory()(self.endpoint)
        self.endpoint.start()
        self.memory: Memory | None = None
        self.blocks = self.block_bytes = 0
        self._link: Link | None = None
        self._transfers: list[Transfer] = []
        device = self.case.device(peer=True)
        if device is not None:
            make_memory(4, 4096, cuda=device).free()  # CUDA opens the files that it keeps

    def do(self, command: str, **arguments: Any) -> Any:
        """Carry out one of the commands below."""
        return COMMANDS[command](self, **arguments)

    def make(self, blocks: int, block_bytes: int, seed: int) -> str:
        """Give back what was registered, register new memory of random bytes; its handle."""
        self.free()
        self.blocks, self.block_bytes = blocks, block_bytes
        self.memory = make_memory(blocks, block_bytes, cuda=self.case.device(peer=True))
        self.memory.fill(pattern(blocks, block_bytes, seed))
        self.allow(read=True, write=False)
        return self.register()

    def register(self) -> str:
        """Register the same memory again; its new handle."""
        assert self.memory is not None
        return encode_handle(self.transport.register(self.memory.pool))

    def withdraw(self) -> None:
        """Take the registration back."""
        self.transport.withdraw()

    def free(self) -> None:
        """Take the registration back and free its memory."""
        self._link, self._transfers = None, []
        self.transport.withdraw()
        if self.memory is not None:
            self.memory.free()
            self.memory = None

    def reuse(self, value: int) -> None:
        """Take the registration back and use its memory for something else: this value everywhere."""
        self.transport.withdraw()
        self.set(value)

    def set(self, value: int) -> None:
        """Fill the memory."""
        assert self.memory is not None
        self.memory.fill(constant(self.blocks, self.block_bytes, value))

    def allow(self, read: bool, write: bool) -> None:
        """What peers may do."""
        self.endpoint.allow_read = lambda grant, regions, offsets, nbytes: read
        self.endpoint.allow_write = lambda grant, regions, offsets, nbytes: write and grant == "grant"

    def content(self) -> list[str]:
        """The bytes of each region, base64."""
        assert self.memory is not None
        return [base64.b64encode(array.tobytes()).decode() for array in self.memory.read_back()]

    def start(self, handle: str, sources: list[int], targets: list[int], times: int) -> None:
        """Start reads from the asker's pool."""
        peer = decode_handle(handle)
        self._link = self.transport.connect(peer, Deadline.after(10, "test"))
        shapes = [BlockShape(self.block_bytes, self.block_bytes, self.blocks)] * REGIONS
        plan = plan_blocks(shapes, sources, targets, "grant")
        self._transfers = [self._link.read(plan) for _ in range(times)]

    def wait(self) -> None:
        """Wait for what start() started."""
        for transfer in self._transfers:
            transfer.wait(Deadline.after(20, "test"))
        if self._link is not None:
            self._link.close()
        self._link, self._transfers = None, []

    def counts(self) -> list[int]:
        """Threads and file descriptors of this process."""
        return [threading.active_count(), len(os.listdir("/proc/self/fd"))]

    def close(self) -> None:
        self.free()
        self.transport.close()
        self.endpoint.close()


COMMANDS: dict[str, Any] = {
    name: getattr(Owner, name)
    for name in (
        "make", "register", "withdraw", "free", "reuse", "set", "allow", "content", "start", "wait", "counts"
    )
}  # fmt: skip


def encode_handle(handle: PoolHandle) -> str:
    return base64.b64encode(msgspec.msgpack.encode(handle)).decode()


def decode_handle(encoded: str) -> PoolHandle:
    return msgspec.msgpack.decode(base64.b64decode(encoded), type=PoolHandle)


def is_cancelled(transfer: Transfer) -> bool:
    """Whether a transfer that was cancelled says so; False when it had ended before."""
    try:
        transfer.done()
    except TransferCancelledError:
        return True
    return False


def block_ids(blocks: int, count: int, seed: int) -> tuple[list[int], list[int]]:
    """``count`` different source blocks and as many target blocks, in random order."""
    rng = np.random.default_rng(seed)
    return rng.permutation(blocks)[:count].tolist(), rng.permutation(blocks)[:count].tolist()


def main() -> None:
    setup = msgspec.json.decode(sys.argv[1], type=Setup)
    owner = Owner(setup)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries that print do not get in between
    print(json.dumps({"ok": owner.endpoint.port}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = {"ok": owner.do(asked.pop("do"), **asked)}
        except FleetError as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
    owner.close()


if __name__ == "__main__":
    main()
