"""What `vllm-fleet bench fabric` runs side by side: our transports, the ceilings, and libraries used directly."""

from __future__ import annotations

import contextlib
import ctypes
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import msgspec
import numpy as np

from vllm_fleet.bench import fabric_owner
from vllm_fleet.bench.blocks import BLOCK_BYTES, REGIONS, Blocks, blocks_in_region, make_blocks
from vllm_fleet.bench.fabric_owner import FLEET, STREAM_BYTES, OwnerReady, OwnerSettings
from vllm_fleet.bench.raw_runner import RawRunner
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import PeerGone
from vllm_fleet.fabric.contract import Transport
from vllm_fleet.fabric.endpoint import Endpoint
from vllm_fleet.fabric.integrity import Mode, Verifier
from vllm_fleet.fabric.plan import BlockCopyPlan, Ints, plan_blocks
from vllm_fleet.net import sockets
from vllm_fleet.net.channel import Credentials, connect

START_S = 120.0
COPY_S = 120.0
RAW_BYTES_MAX = 1 << 30
"""Libraries used directly hold two pools of their own; larger sizes are not run with them."""


class Case(NamedTuple):
    """One size: ``nbytes`` in scattered blocks of a pool of ``total`` bytes, chosen by ``seed`` (blocks.scattered)."""

    nbytes: int
    total: int
    seed: int


class Contender(Protocol):
    """One way to get scattered blocks of the owner's memory into this process's."""

    name: str
    kind: str
    """transport, ceiling or library."""
    sms: int
    bytes_max: int

    def prepare(self, source: Ints, target: Ints, case: Case) -> None:
        """Work out what to copy: blocks ``source[i]`` to ``target[i]`` in every region."""
        ...

    def copy(self) -> float:
        """Copy what was prepared and wait until it is there; the seconds it took."""
        ...

    def cpu_s(self) -> float:
        """CPU seconds that both sides have used so far; nan when that is not known."""
        ...

    def close(self) -> None: ...


class Arena:
    """The owner's process, this side's pool, and what both have registered."""

    def __init__(self, names: Sequence[str], nbytes: int, cuda: tuple[int, int] | None) -> None:
        self.nbytes = nbytes
        self.cuda = cuda
        token = secrets.token_hex(32)
        command = [sys.executable, "-m", "vllm_fleet.bench.fabric_owner"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        settings = OwnerSettings(token, nbytes, tuple(names), None if cuda is None else cuda[1])
        self._say(msgspec.json.encode(settings).decode())
        self.token = bytes.fromhex(token)
        self.endpoint = Endpoint(sockets.listen("127.0.0.1", 0, setting="bench"), Credentials(FLEET, self.token))
        self.blocks: Blocks = make_blocks(nbytes, None if cuda is None else cuda[0], filled=False)
        self.transports, own = fabric_owner.register(tuple(names), self.endpoint, self.blocks)
        self.endpoint.start()
        self.owner = msgspec.json.decode(self._hear().encode(), type=OwnerReady)
        self.refused = {**own.refused, **self.owner.refused}

    def transport(self, name: str) -> Transport:
        """This side's transport of a name that was not refused."""
        transport: Transport = self.transports[name]
        return transport

    def plan(self, source: Ints, target: Ints) -> BlockCopyPlan:
        """A plan for these blocks in every region."""
        return plan_blocks(self.blocks.shapes, source.tolist(), target.tolist(), "bench")

    def owner_cpu_s(self) -> float:
        """CPU seconds the owner's process has used."""
        self._say("cpu")
        return float(self._hear())

    def close(self) -> None:
        """End both sides."""
        for transport in self.transports.values():
            transport.close()
        self.endpoint.close()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        self._process.stdout.close()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _hear(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PeerGone("the benchmark's owner process ended; its reason is on standard error")
        return line


class OurTransport:
    """One of our transports, optionally with checksums."""

    kind = "transport"

    def __init__(self, arena: Arena, name: str, checksums: Mode = "off") -> None:
        self.name = name if checksums == "off" else f"{name}, {checksums} checksums"
        self._arena = arena
        transport = arena.transport(name)
        self.sms = transport.capabilities.sms
        self.bytes_max = arena.nbytes
        self._handle = arena.owner.handles[name]
        self._link = transport.connect(self._handle, Deadline.after(START_S, "bench.START_S"))
        credentials = Credentials(FLEET, arena.token)
        deadline = Deadline.after(START_S, "bench.START_S")
        self._channel = connect(arena.owner.host, arena.owner.port, credentials, deadline)
        self._verifier = Verifier(arena.blocks.pool, checksums, np.random.default_rng(0))
        self._plan = arena.plan(np.zeros(0, np.int64), np.zeros(0, np.int64))

    def prepare(self, source: Ints, target: Ints, case: Case) -> None:
        self._plan = self._arena.plan(source, target)
        self._read(Verifier(self._arena.blocks.pool, "full", np.random.default_rng(0)))  # every byte, before any figure

    def copy(self) -> float:
        began = time.perf_counter()
        self._read(self._verifier)
        return time.perf_counter() - began

    def cpu_s(self) -> float:
        return time.process_time() + self._arena.owner_cpu_s()

    def close(self) -> None:
        self._link.close()
        self._channel.close()

    def _read(self, verifier: Verifier) -> None:
        deadline = Deadline.after(COPY_S, "bench.COPY_S")
        with verifier.checking(self._channel, self._handle.pool, self._plan, deadline):
            self._link.read(self._plan).wait(deadline)


class Memcpy:
    """The ceiling of CPU memory: the same scattered blocks copied inside this process, one memmove(3) for each.

    ctypes adds about 0.15 us to the 3 us of each block; the addresses are worked out before the clock starts.
    """

    name, kind, sms = "memcpy in one process", "ceiling", 0

    def __init__(self, nbytes: int) -> None:
        self.bytes_max = nbytes
        self.source = make_blocks(nbytes, None, filled=True)
        self.target = make_blocks(nbytes, None, filled=False)
        self._each = blocks_in_region(nbytes)
        self._pairs: list[tuple[int, int]] = []

    def prepare(self, source: Ints, target: Ints, case: Case) -> None:
        starts = np.arange(REGIONS)[:, None] * self._each
        to = int(self.target.memory.ctypes.data) + ((starts + target[None, :]) * BLOCK_BYTES).reshape(-1)
        start = int(self.source.memory.ctypes.data) + ((starts + source[None, :]) * BLOCK_BYTES).reshape(-1)
        self._pairs = list(zip(to.tolist(), start.tolist(), strict=True))

    def copy(self) -> float:
        move = ctypes.memmove
        began = time.perf_counter()
        for to, start in self._pairs:
            move(to, start, BLOCK_BYTES)
        return time.perf_counter() - began

    def cpu_s(self) -> float:
        return time.process_time()

    def close(self) -> None:
        pass


class Gather:
    """A memcpy in C of each scattered block into contiguous memory: easier than what a handoff needs."""

    name, kind, sms = "gather in one process", "ceiling", 0

    def __init__(self, memcpy: Memcpy) -> None:
        self.bytes_max = memcpy.bytes_max
        self._source, self._target = memcpy.source.memory, memcpy.target.memory
        self._each = blocks_in_region(self.bytes_max)
        self._rows: Ints = np.zeros(0, np.int64)

    def prepare(self, source: Ints, target: Ints, case: Case) -> None:
        self._rows = (np.arange(REGIONS)[:, None] * self._each + source[None, :]).reshape(-1)

    def copy(self) -> float:
        began = time.perf_counter()
        # mode "clip": NumPy would copy through a buffer to be able to undo an index out of range
        np.take(self._source, self._rows, axis=0, out=self._target[: len(self._rows)], mode="clip")
        return time.perf_counter() - began

    def cpu_s(self) -> float:
        return time.process_time()

    def close(self) -> None:
        pass


class RawStream:
    """The ceiling of one TCP connection: contiguous bytes, plain sockets, 1 MiB at a time."""

    name, kind, sms = "raw TCP stream", "ceiling", 0

    def __init__(self, arena: Arena) -> None:
        self.bytes_max = arena.nbytes
        self._arena = arena
        deadline = Deadline.after(START_S, "bench.START_S")
        self._socket = sockets.dial(arena.owner.host, arena.owner.stream_port, deadline)
        self._socket.settimeout(COPY_S)
        self._socket.sendall(arena.token)
        self._view = memoryview(arena.blocks.memory.reshape(-1))
        self._nbytes = 0

    def prepare(self, source: Ints, target: Ints, case: Case) -> None:
        self._nbytes = len(source) * REGIONS * BLOCK_BYTES

    def copy(self) -> float:
        self._socket.settimeout(None)  # as our own transport: waits in the kernel
        total, began = self._nbytes, time.perf_counter()
        self._socket.sendall(total.to_bytes(8, "little"))
        done = 0
        while done < total:
            got = self._socket.recv_into(self._view[done : min(total, done + STREAM_BYTES)])
            if not got:
                raise PeerGone("the raw stream ended early")
            done += got
        return time.perf_counter() - began

    def cpu_s(self) -> float:
        return time.process_time() + self._arena.owner_cpu_s()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class RawLibrary:
    """A library used directly, on as many blocks of pools of its own; see raw_runner.py."""

    kind, sms = "library", 0

    def __init__(self, name: str, nbytes: int) -> None:
        self.bytes_max = min(nbytes, RAW_BYTES_MAX)
        self.name = f"{name} used directly"
        self._runner = RawRunner(name, self.bytes_max)

    def prepare(self, source: Ints, target: Ints, case: Case) -> None:
        self._runner.turn(f"prepare {case.nbytes} {case.total} {case.seed}")

    def copy(self) -> float:
        return float(self._runner.turn("copy"))

    def cpu_s(self) -> float:
        return float("nan")

    def close(self) -> None:
        self._runner.close()
