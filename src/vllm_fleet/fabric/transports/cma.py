"""Cross-memory attach: one process copies straight out of or into another's memory: process_vm_readv(2), _writev(2).

One copy, no thread or system call on the owner's side. Both processes are on one host, in one PID namespace, of one
user; where Yama restricts ptrace (ptrace_scope 1) the owner allows its readers. The kernel checks every address in the
owner's address space: a wrong one fails the call and nothing else.

The owner keeps a nonce in its memory, another one for each registration. The other side compares it with the handle's
before it writes and after every transfer: whoever withdrew, freed or registered again, or was replaced by another
process of the same number, is found out although nobody there has to answer.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import os
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta, Struct

from vllm_fleet.core import limits
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import LinkError
from vllm_fleet.fabric.contract import Capabilities, KVPool, TransferError
from vllm_fleet.fabric.crew import Crew
from vllm_fleet.fabric.endpoint import Endpoint
from vllm_fleet.fabric.owner import OwnedPool
from vllm_fleet.fabric.plan import BlockCopyPlan, Ints
from vllm_fleet.fabric.work import WorkLink, check_bounds
from vllm_fleet.wire.fabric import PoolHandle
from vllm_fleet.wire.names import DECODE_ERRORS, Count

PIECE_BYTES_MAX = 8 << 20
"""Bytes of one system call: about 1 ms, the longest a cancel waits."""

THREADS = min(4, os.cpu_count() or 1)
"""Threads that share one long copy, see fabric/crew.py."""

TOGETHER_BYTES_MIN = 8 << 20
"""Transfers below this, a millisecond, are not worth waking other threads for."""

PROBE_BYTES = 32
_PR_SET_PTRACER = 0x59616D61
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
for _name in ("process_vm_readv", "process_vm_writev"):
    if hasattr(_libc, _name):
        _call = getattr(_libc, _name)
        _call.restype = ctypes.c_ssize_t
        _call.argtypes = [ctypes.c_int, *[ctypes.c_void_p, ctypes.c_ulong] * 2, ctypes.c_ulong]


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
    local, remote = np.stack([target, nbytes], axis=1), np.stack([source, nbytes], axis=1)
    _move(_libc.process_vm_readv, pid, local, remote, slice(0, len(nbytes)), int(nbytes.sum()))


def _move(call: Callable[..., int], pid: int, local: Ints, remote: Ints, piece: slice, wanted: int) -> None:
    """One system call on a piece of two arrays of iovecs, of shape [runs, 2], which holds ``wanted`` bytes."""
    count, first = piece.stop - piece.start, piece.start * local.strides[0]
    copied = call(pid, local.ctypes.data + first, count, remote.ctypes.data + first, count, 0)
    if copied == wanted:
        return
    if copied >= 0:
        raise TransferError(f"process {pid} has only {copied} of {wanted} bytes mapped where its pool should be")
    number = ctypes.get_errno()
    if number == errno.ESRCH:
        raise TransferError(f"process {pid} is gone")
    if number == errno.EPERM:
        raise TransferError(
            f"process {pid} may not be reached: another user, or ptrace is restricted (kernel.yama.ptrace_scope)"
        )
    raise TransferError(f"copying to or from process {pid} failed: {os.strerror(number)}")


class CmaTransport:
    """See the module's docstring."""

    name = "cma"
    capabilities = Capabilities(cpu=True, cuda=False, one_sided=True, same_host=True)

    def __init__(self, endpoint: Endpoint) -> None:
        self._owned = OwnedPool(endpoint)
        self._nonce = np.zeros(PROBE_BYTES, np.uint8)
        self._links: list[WorkLink] = []
        self._lock = threading.Lock()
        self._crew = Crew(THREADS, "fleet-cma-crew")

    def register(self, pool: KVPool) -> PoolHandle:
        if pool.cuda is not None:
            raise LinkError("cma moves CPU memory only, and the pool is in CUDA memory; use cuda_ipc")
        if not hasattr(_libc, "process_vm_readv"):
            raise LinkError("this system has no process_vm_readv")
        self.withdraw()
        nonce = secrets.token_bytes(PROBE_BYTES)
        self._nonce[:] = np.frombuffer(nonce, np.uint8)
        _allow_readers()
        details = CmaDetails(
            host=host_id(),
            pid=os.getpid(),
            started=process_started(os.getpid()),
            addresses=tuple(region.address for region in pool.regions),
            probe=int(self._nonce.ctypes.data),
            nonce=nonce,
        )
        return PoolHandle(self.name, self._owned.register(pool), pool.sizes, _encode(details))

    def withdraw(self) -> None:
        self._nonce[:] = 0
        self._owned.withdraw()
        with self._lock:
            links, self._links = self._links, []
        for link in links:
            link.close()

    def connect(self, peer: PoolHandle, deadline: Deadline) -> WorkLink:
        deadline.check("cma", "connecting")
        pool = self._owned.pool
        if pool is None:
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
        copier = _Copier(pool, peer, details, self._crew)
        try:
            copier.check()
        except (TransferError, OverflowError) as error:
            raise LinkError(str(error)) from error
        link = WorkLink(self.name, str(details.pid), copier)
        with self._lock:
            self._links.append(link)
        return link

    def close(self) -> None:
        self.withdraw()
        self._crew.close()


class _Copier:
    """Carries out plans between one peer's pool and ours."""

    def __init__(self, pool: KVPool, peer: PoolHandle, details: CmaDetails, crew: Crew) -> None:
        self._pid = details.pid
        self._theirs = np.array(details.addresses, np.int64)
        self._own = np.array([region.address for region in pool.regions], np.int64)
        self._their_bytes = np.array(peer.region_bytes, np.int64)
        self._own_bytes = np.array(pool.sizes, np.int64)
        self._crew = crew
        self._probe = np.array([details.probe], np.int64)
        self._nonce = details.nonce
        self._seen = np.zeros(PROBE_BYTES, np.uint8)
        self._seen_at = np.array([self._seen.ctypes.data], np.int64)

    def check(self) -> None:
        """TransferError unless the peer's registration stands, by a read of its nonce."""
        read_memory(self._pid, self._probe, self._seen_at, np.array([PROBE_BYTES], np.int64))
        if self._seen.tobytes() != self._nonce:
            raise TransferError(f"process {self._pid} does not hold what the peer registered: withdrawn or replaced")

    def read(self, plan: BlockCopyPlan, cancelled: threading.Event) -> None:
        if not len(plan):
            return
        check_bounds(plan, self._their_bytes, self._own_bytes)
        plan = plan.split(PIECE_BYTES_MAX)
        own, theirs = self._own[plan.region] + plan.target, self._theirs[plan.region] + plan.source
        self._copy(_libc.process_vm_readv, plan, own, theirs, cancelled)

    def write(self, plan: BlockCopyPlan, cancelled: threading.Event) -> None:
        if not len(plan):
            return
        check_bounds(plan, self._own_bytes, self._their_bytes)
        plan = plan.split(PIECE_BYTES_MAX)
        own, theirs = self._own[plan.region] + plan.source, self._theirs[plan.region] + plan.target
        self.check()
        self._copy(_libc.process_vm_writev, plan, own, theirs, cancelled)

    def interrupt(self) -> None:
        """Nothing to wake: a system call takes a millisecond."""

    def close(self) -> None:
        """Nothing is kept."""

    def _copy(
        self, call: Callable[..., int], plan: BlockCopyPlan, own: Ints, theirs: Ints, cancelled: threading.Event
    ) -> None:
        local, remote = np.stack([own, plan.nbytes], axis=1), np.stack([theirs, plan.nbytes], axis=1)
        pieces = plan.pieces(limits.IOV_MAX // 4, PIECE_BYTES_MAX)
        taking, failed = threading.Lock(), threading.Event()

        def work() -> None:
            while not cancelled.is_set() and not failed.is_set():
                with taking:
                    piece = next(pieces, None)
                if piece is None:
                    return
                try:
                    _move(call, self._pid, local, remote, piece, int(plan.nbytes[piece].sum()))
                except TransferError:
                    failed.set()
                    raise

        if plan.total_bytes >= TOGETHER_BYTES_MIN:
            self._crew.share(work)
        else:
            work()
        self.check()


def _allow_readers() -> None:
    """Let processes of this user read this one where Yama allows only ancestors (ptrace_scope 1)."""
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    if scope.exists() and scope.read_text().strip() == "1":
        _libc.prctl(_PR_SET_PTRACER, ctypes.c_ulong(_PR_SET_PTRACER_ANY), 0, 0, 0)
