"""Send from and receive into scattered memory: sendmsg(2) and recvmsg(2) on arrays of addresses, with no copy and no
work in Python per piece of memory."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import math
import os
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vllm_fleet.core import limits
from vllm_fleet.core.errors import PeerGone

Ints: TypeAlias = NDArray[np.int64]

_libc = ctypes.CDLL(None, use_errno=True)
_SO_INCOMING_CPU: Final = 49  # asm-generic/socket.h; the CPU that took in the socket's last packet
_VECTOR_BYTES: Final = 16  # struct iovec: an address and a length

CALL_BYTES_MAX: Final = 2 << 20
"""Bytes of one system call. Longer ones hold the socket's lock for so long that the two sides take turns instead of
working at once: over loopback 2 MiB move 4.7 GB/s, 32 MiB 3.7 (2 cores, Linux 6.18, 2026-11-21)."""


class _Message(ctypes.Structure):
    """struct msghdr of Linux on 64-bit machines."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_bytes", ctypes.c_uint32),
        ("vectors", ctypes.c_void_p),
        ("count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_bytes", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


for _call in (_libc.sendmsg, _libc.recvmsg):
    _call.restype = ctypes.c_ssize_t
    _call.argtypes = [ctypes.c_int, ctypes.POINTER(_Message), ctypes.c_int]


def send_runs(connected: socket.socket, addresses: Ints, nbytes: Ints, idle_s: float, peer: str) -> None:
    """Send the bytes at ``addresses``, in order; arrays of shape [runs], no run empty.

    Another thread may end it with shutdown(2) on the socket, but must not close the socket meanwhile.

    Raises:
        PeerGone: the connection broke, or the peer took no byte for ``idle_s`` seconds.
    """
    _move(_libc.sendmsg, connected, addresses, nbytes, idle_s, peer, socket.MSG_NOSIGNAL)


def receive_runs(connected: socket.socket, addresses: Ints, nbytes: Ints, idle_s: float, peer: str) -> None:
    """Receive exactly as many bytes into the memory at ``addresses``; otherwise as send_runs."""
    _move(_libc.recvmsg, connected, addresses, nbytes, idle_s, peer, socket.MSG_WAITALL)


def _move(
    call: Callable[..., int],
    connected: socket.socket,
    addresses: Ints,
    nbytes: Ints,
    idle_s: float,
    peer: str,
    flags: int,
) -> None:
    try:
        _block(connected, idle_s)
    except OSError as error:
        raise PeerGone(f"the connection to {peer} is closed") from error
    vectors = _vectors(addresses, nbytes)
    ends = np.cumsum(vectors[:, 1])
    message = _Message()
    file, base, start, moved = connected.fileno(), int(vectors.ctypes.data), 0, 0
    while start < len(vectors):
        fitting = int(np.searchsorted(ends, moved + CALL_BYTES_MAX, side="right")) - start
        message.vectors = base + start * _VECTOR_BYTES
        message.count = max(1, min(fitting, limits.IOV_MAX))
        now = call(file, ctypes.byref(message), flags)
        if now <= 0:
            _explain(ctypes.get_errno() if now < 0 else 0, idle_s, peer)
            continue
        moved += now
        begun = int(np.searchsorted(ends, moved, side="right"))
        if begun < len(vectors):  # the rest of a run that was moved in part
            left = int(ends[begun]) - moved
            vectors[begun, 0] += vectors[begun, 1] - left
            vectors[begun, 1] = left
        start = begun


def _is_local(connected: socket.socket) -> bool:
    """Whether the peer is on this host."""
    with contextlib.suppress(OSError):  # closed: the next call says so
        return bool(connected.getpeername()[0] == connected.getsockname()[0])
    return False


@contextlib.contextmanager
def off_the_senders_cpu(connected: socket.socket) -> Iterator[None]:
    """Keep this thread off the CPU that a peer on this host sends from, if it can run elsewhere; for long transfers.

    Linux likes to wake two processes that talk to each other on one CPU, where they take turns: 32 MiB over loopback
    then took 13 ms instead of 8 (2 cores, Linux 6.18, 2026-11-21).
    """
    allowed: set[int] = set()
    with contextlib.suppress(OSError):  # a hint: whatever goes wrong with it, the bytes arrive
        senders = connected.getsockopt(socket.SOL_SOCKET, _SO_INCOMING_CPU)
        whole = os.sched_getaffinity(0)
        if senders in whole and len(whole) > 1 and _is_local(connected):
            os.sched_setaffinity(0, whole - {senders})
            allowed = whole
    try:
        yield
    finally:
        if allowed:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, allowed)


def _vectors(addresses: Ints, nbytes: Ints) -> Ints:
    """iovecs of runs, none longer than CALL_BYTES_MAX; shape [iovecs, 2]."""
    if int(nbytes.max(initial=0)) > CALL_BYTES_MAX:
        parts = -(-nbytes // CALL_BYTES_MAX)
        index = np.repeat(np.arange(len(nbytes)), parts)
        skipped = (np.arange(len(index)) - np.repeat(np.cumsum(parts) - parts, parts)) * CALL_BYTES_MAX
        addresses, nbytes = addresses[index] + skipped, np.minimum(nbytes[index] - skipped, CALL_BYTES_MAX)
    return np.stack([addresses, nbytes], axis=1)


def _block(connected: socket.socket, idle_s: float) -> None:
    """Let calls on the socket wait in the kernel, for at most ``idle_s`` without a byte."""
    connected.settimeout(None)
    fraction, whole = math.modf(idle_s)
    waiting = struct.pack("@ll", int(whole), int(fraction * 1e6))
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, waiting)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, waiting)


def _explain(number: int, idle_s: float, peer: str) -> None:
    if number == errno.EINTR:
        return
    if number == 0:
        raise PeerGone(f"{peer} closed the connection in the middle of a transfer")
    if number in (errno.EAGAIN, errno.EWOULDBLOCK):
        raise PeerGone(f"no byte moved to or from {peer} for {idle_s:g} s")
    raise PeerGone(f"the connection to {peer} broke: {os.strerror(number)}")
