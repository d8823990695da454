"""Send from and receive into scattered memory: sendmsg(2) and recvmsg(2) on arrays of addresses, with no copy and no
work in Python per piece of memory."""

from __future__ import annotations

import ctypes
import errno
import math
import os
import socket
import struct
from collections.abc import Callable
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vllm_fleet.core import limits
from vllm_fleet.core.errors import PeerGone

Ints: TypeAlias = NDArray[np.int64]

_libc = ctypes.CDLL(None, use_errno=True)
_VECTOR_BYTES: Final = 16  # struct iovec: an address and a length


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
    vectors = np.stack([addresses, nbytes], axis=1)
    message = _Message()
    file, base, start = connected.fileno(), int(vectors.ctypes.data), 0
    while start < len(vectors):
        message.vectors = base + start * _VECTOR_BYTES
        message.count = min(len(vectors) - start, limits.IOV_MAX)
        moved = call(file, ctypes.byref(message), flags)
        if moved <= 0:
            _explain(ctypes.get_errno() if moved < 0 else 0, idle_s, peer)
            continue
        start += _advance(vectors[start : start + message.count], moved)


def _block(connected: socket.socket, idle_s: float) -> None:
    """Let calls on the socket wait in the kernel, for at most ``idle_s`` without a byte."""
    connected.settimeout(None)
    fraction, whole = math.modf(idle_s)
    waiting = struct.pack("@ll", int(whole), int(fraction * 1e6))
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, waiting)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, waiting)


def _advance(vectors: Ints, moved: int) -> int:
    """Take ``moved`` bytes off the front of ``vectors``; how many of them are used up."""
    ends = np.cumsum(vectors[:, 1])
    whole = int(np.searchsorted(ends, moved, side="right"))
    if whole < len(vectors):
        part = moved - (int(ends[whole - 1]) if whole else 0)
        vectors[whole, 0] += part
        vectors[whole, 1] -= part
    return whole


def _explain(number: int, idle_s: float, peer: str) -> None:
    if number == errno.EINTR:
        return
    if number == 0:
        raise PeerGone(f"{peer} closed the connection in the middle of a transfer")
    if number in (errno.EAGAIN, errno.EWOULDBLOCK):
        raise PeerGone(f"no byte moved to or from {peer} for {idle_s:g} s")
    raise PeerGone(f"the connection to {peer} broke: {os.strerror(number)}")
