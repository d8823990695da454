"""Cross-memory attach: the reader copies straight out of the owner's memory with process_vm_readv(2).

One copy, no thread or system call on the owner's side. Both processes are on one host, in one PID namespace, of one
user; where Yama restricts ptrace (ptrace_scope 1) the owner allows its readers. The kernel checks every address in the
owner's address space: a wrong one fails the call and nothing else.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import os
import secrets
import threading
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta, Struct

from vllm_fleet.core import limits
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import LinkError
from vllm_fleet.fabric.contract import KVPool, TransferError
from vllm_fleet.fabric.endpoint import Endpoint
from vllm_fleet.fabric.plan import BlockCopyPlan, Ints
from vllm_fleet.fabric.work import WorkLink, check_bounds
from vllm_fleet.wire.fabric import PoolHandle
from vllm_fleet.wire.names import DECODE_ERRORS, Count

PIECE_BYTES_MAX = 16 << 20  # bytes per system call: about 1 ms, the longest a cancel waits
PROBE_BYTES = 32
_PR_SET_PTRACER = 0x59616D61
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.process_vm_readv.argtypes = [
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_ulong,
]


class CmaDetails(Struct, frozen=True):
    """The cma part of a PoolHandle."""

    host: Annotated[str, Meta(max_length=limits.ID_LEN_MAX)]
    pid: Count
    started: Count
    """Start time of the process in clock ticks: tells it from a later one with the same pid."""
    addresses: Annotated[tuple[Count, ...], Meta(max_length=limits.REGIONS_MAX)]
    probe: Count
    """Address of PROBE_BYTES random bytes ..."""
    nonce: Annotated[bytes, Meta(min_length=PROBE_BYTES, max_length=PROBE_BYTES)]
    """... and what they are."""


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(CmaDetails).decode


def host_id() -> str:
    """Equal for processes that can see each other's pids: the boot and the PID namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"


def process_started(pid: int) -> int:
    """The start time of a process in clock ticks since boot; 0 when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[19])


def read_memory(pid: int, source: Ints, target: Ints, nbytes: Ints) -> None:
    """Copy runs of another process's memory into this one's: arrays of addresses and lengths, at most IOV_MAX each.

    Raises:
        TransferError: the process is gone, does not allow it, or an address is not mapped there.
    """
    local = np.stack([target, nbytes], axis=1)
    remote = np.stack([source, nbytes], axis=1)
    wanted, count = int(nbytes.sum()), len(nbytes)
    copied = _libc.process_vm_readv(pid, local.ctypes.data, count, remote.ctypes.data, count, 0)
    if copied == wanted:
        return
    if copied >= 0:
        raise TransferError(f"process {pid} has only {copied} of {wanted} bytes mapped where its pool should be")
    number = ctypes.get_errno()
    if number == errno.ESRCH:
        raise TransferError(f"process {pid} is gone")
    if number == errno.EPERM:
        raise TransferError(
            f"process {pid} may not be read: another user, or ptrace is restricted (kernel.yama.ptrace_scope)"
        )
    raise TransferError(f"reading process {pid} failed: {os.strerror(number)}")


class CmaTransport:
    """See the module's docstring."""

    name = "cma"

    def __init__(self, endpoint: Endpoint) -> None:
        self._pool: KVPool | None = None
        self._nonce = np.zeros(PROBE_BYTES, np.uint8)
        self._links: list[WorkLink] = []
        self._lock = threading.Lock()

    def register(self, pool: KVPool) -> PoolHandle:
        if not hasattr(_libc, "process_vm_readv"):
            raise LinkError("this system has no process_vm_readv")
        self._pool = pool
        nonce = secrets.token_bytes(PROBE_BYTES)
        self._nonce = np.frombuffer(bytearray(nonce), np.uint8)
        _allow_readers()
        details = CmaDetails(
            host=host_id(),
            pid=os.getpid(),
            started=process_started(os.getpid()),
            addresses=tuple(region.address for region in pool.regions),
            probe=int(self._nonce.ctypes.data),
            nonce=nonce,
        )
        sizes = tuple(region.nbytes for region in pool.regions)
        return PoolHandle(self.name, secrets.token_hex(16), sizes, _encode(details))

    def connect(self, peer: PoolHandle, deadline: Deadline) -> WorkLink:
        deadline.check("cma", "connecting")
        if self._pool is None:
            raise LinkError("register a pool before connecting")
        try:
            details = _decode(peer.details)
        except DECODE_ERRORS as error:
            raise LinkError(f"the peer's cma handle cannot be read: {error}") from error
        if len(details.addresses) != len(peer.region_bytes):
            raise LinkError("the peer's cma handle is inconsistent")
        if details.host != host_id():
            raise LinkError("the peer is on another host or in another PID namespace")
        if process_started(details.pid) != details.started:
            raise LinkError(f"process {details.pid} is not the peer that registered: it has gone or been replaced")
        self._probe(details)
        copier = _Copier(self._pool, peer, details)
        link = WorkLink(self.name, str(details.pid), copier.copy, lambda: None)
        with self._lock:
            self._links.append(link)
        return link

    def close(self) -> None:
        with self._lock:
            links, self._links = self._links, []
        for link in links:
            link.close()
        self._pool = None

    @staticmethod
    def _probe(details: CmaDetails) -> None:
        seen = np.zeros(PROBE_BYTES, np.uint8)
        one = np.array([PROBE_BYTES], np.int64)
        try:
            read_memory(details.pid, np.array([details.probe]), np.array([seen.ctypes.data]), one)
        except (TransferError, OverflowError) as error:
            raise LinkError(str(error)) from error
        if seen.tobytes() != details.nonce:
            raise LinkError(f"process {details.pid} does not hold what the peer registered")


class _Copier:
    """Carries out plans between one peer's pool and ours."""

    def __init__(self, pool: KVPool, peer: PoolHandle, details: CmaDetails) -> None:
        self._pid = details.pid
        self._started = details.started
        self._source = np.array(details.addresses, np.int64)
        self._target = np.array([region.address for region in pool.regions], np.int64)
        self._source_bytes = np.array(peer.region_bytes, np.int64)
        self._target_bytes = np.array([region.nbytes for region in pool.regions], np.int64)

    def copy(self, plan: BlockCopyPlan, cancelled: threading.Event) -> None:
        if not len(plan):
            return
        check_bounds(plan, self._source_bytes, self._target_bytes)
        plan = plan.split(PIECE_BYTES_MAX)
        source = self._source[plan.region] + plan.source
        target = self._target[plan.region] + plan.target
        for piece in plan.pieces(limits.IOV_MAX, PIECE_BYTES_MAX):
            if cancelled.is_set():
                return
            read_memory(self._pid, source[piece], target[piece], plan.nbytes[piece])
        if process_started(self._pid) != self._started:
            raise TransferError(f"process {self._pid} was replaced while it was read")


def _allow_readers() -> None:
    """Let processes of this user read this one where Yama allows only ancestors (ptrace_scope 1)."""
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    if scope.exists() and scope.read_text().strip() == "1":
        _libc.prctl(_PR_SET_PTRACER, ctypes.c_ulong(_PR_SET_PTRACER_ANY), 0, 0, 0)
