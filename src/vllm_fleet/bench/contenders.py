"""What `vllm-fleet bench fabric` runs side by side: our transports, the ceilings, and libraries used directly."""

from __future__ import annotations

import contextlib
import ctypes
import socket
import time
from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np

from vllm_fleet.bench.arena import Arena
from vllm_fleet.bench.blocks import BLOCK_BYTES, REGIONS, blocks_in_region, make_blocks
from vllm_fleet.bench.fabric_owner import FLEET, STREAM_BYTES
from vllm_fleet.bench.raw_runner import RawRunner
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import PeerGone
from vllm_fleet.fabric.integrity import Mode, Verifier
from vllm_fleet.fabric.plan import Ints
from vllm_fleet.net import sockets
from vllm_fleet.net.channel import Credentials, connect

START_S = 120.0
COPY_S = 120.0
SETTLE_S = 500e-6
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

    def checks(self) -> float | None:
        """Seconds of checksums for each second of copying so far; None where there are none."""
        ...

    def cpu_s(self) -> float:
        """CPU seconds that both sides have used so far; nan when that is not known."""
        ...

    def close(self) -> None: ...


class OurTransport:
    """One of our transports, optionally with checksums."""

    kind = "transport"

    def __init__(self, arena: Arena, name: str, checksums: Mode = "off") -> None:
        self.name = name if checksums == "off" else f"{name}, {checksums} checksums"
        self._arena = arena
        self._checksums = checksums
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
        self._plan = replace(self._plan)  # a plan is read once: what was worked out for this one is thrown away
        self._before()
        began = time.perf_counter()
        self._read(self._verifier)
        return time.perf_counter() - began

    def _before(self) -> None:
        """What is done before the clock starts."""

    def checks(self) -> float | None:
        copied = self._verifier.copied_s
        return self._verifier.checked_s / copied if self._checksums != "off" and copied else None

    def cpu_s(self) -> float:
        return time.process_time() + self._arena.owner_cpu_s()

    def close(self) -> None:
        self._link.close()
        self._channel.close()

    def _read(self, verifier: Verifier) -> None:
        deadline = Deadline.after(COPY_S, "bench.COPY_S")
        with verifier.checking(self._channel, self._handle.pool, self._plan, deadline):
            self._link.read(self._plan).wait(deadline)


class PreparedReads(OurTransport):
    """One of our transports, each plan prepared before the clock starts (Link.prepare), as where it is known early."""

    def __init__(self, arena: Arena, name: str) -> None:
        super().__init__(arena, name)
        self.name = f"{name}, prepared"
        self._idle_s = 0.0

    def cpu_s(self) -> float:
        return super().cpu_s() - self._idle_s

    def _before(self) -> None:
        self._link.prepare(self._plan)
        began, cpu = time.perf_counter(), time.process_time()
        while time.perf_counter() < began + SETTLE_S:  # what prepare() started has ended; no sleep, from which to wake
            pass
        self._idle_s += time.process_time() - cpu


class NoChecks:
    """A contender that is none of our transports."""

    sms = 0

    def checks(self) -> float | None:
        return None

    def cpu_s(self) -> float:
        return float("nan")

    def close(self) -> None:
        """Nothing is kept."""


class Memcpy(NoChecks):
    """The ceiling of CPU memory: the same scattered blocks copied inside this process, one memmove(3) for each.

    ctypes adds about 0.15 us to the 3 us of each block; the addresses are worked out before the clock starts.
    """

    name, kind = "memcpy in one process", "ceiling"

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


class Gather(NoChecks):
    """A memcpy in C of each scattered block into contiguous memory: easier than what a handoff needs."""

    name, kind = "gather in one process", "ceiling"

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


class RawStream(NoChecks):
    """The ceiling of one TCP connection: contiguous bytes, plain sockets, 1 MiB at a time."""

    name, kind = "raw TCP stream", "ceiling"

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


class RawLibrary(NoChecks):
    """A library used directly, on as many blocks of pools of its own; see raw_runner.py."""

    kind = "library"

    def __init__(self, name: str, nbytes: int) -> None:
        self.bytes_max = min(nbytes, RAW_BYTES_MAX)
        self.name = f"{name} used directly"
        self._runner = RawRunner(name, self.bytes_max)

    def prepare(self, source: Ints, target: Ints, case: Case) -> None:
        self._runner.turn(f"prepare {case.nbytes} {case.total} {case.seed}")

    def copy(self) -> float:
        return float(self._runner.turn("copy"))

    def close(self) -> None:
        self._runner.close()
