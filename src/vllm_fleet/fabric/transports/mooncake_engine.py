"""One Mooncake TransferEngine: registered memory, and groups of reads and writes that are started and polled.

Facts about the library (0.3.13): a batch's status can be asked for without blocking only when it has one run
(transfer_check_status looks at the first); get_batch_transfer_status blocks for up to 30 s, spinning. A batch that has
failed is given back while its other runs are still under way, and they go on: only the end of the engine stops them.
"""

from __future__ import annotations

import importlib
import os
import socket
import stat
import struct
from typing import Any

from vllm_fleet.core.errors import ConfigError, LinkError
from vllm_fleet.fabric.contract import TransferError
from vllm_fleet.fabric.plan import Ints

GROUP_RUNS_MAX = 512
"""Runs submitted at once: 4096 were refused by 0.3.13 (its queue for one peer holds 1024 and as many wait)."""

_ENDED, _FAILED = 1, -1
_ACCEPT_US = 20_000


def library() -> Any:
    """Mooncake's extension module; ConfigError where it is not installed or cannot be loaded."""
    try:
        return importlib.import_module("mooncake.engine")
    except ImportError as error:
        raise ConfigError(
            f"fabric.transports: mooncake cannot be loaded ({error}); run: pip install 'vllm-fleet[mooncake]', and on "
            "Debian or Ubuntu: apt-get install libibverbs1 librdmacm1 libnuma1"
        ) from error


class Engine:
    """A TransferEngine that others reach as ``session``. For one thread at a time."""

    def __init__(self, host: str, protocol: str, metadata: str, devices: str, name: str) -> None:
        """``name`` is the segment's name where ``metadata`` is a server. Raises LinkError when it cannot start."""
        self._engine = library().TransferEngine()
        self._single = protocol == "tcp"
        own = host if metadata == "P2PHANDSHAKE" else name
        if self._engine.initialize(own, metadata, protocol, devices) != 0:
            raise LinkError(
                f"mooncake could not start on {host} with protocol {protocol} and metadata {metadata}; its reason is "
                "on standard error"
            )
        _shorten_accept(self._engine.get_rpc_port())
        self.session = f"{host}:{self._engine.get_rpc_port()}" if metadata == "P2PHANDSHAKE" else name

    def register(self, addresses: list[int], nbytes: list[int]) -> None:
        """Let peers reach this memory, and RDMA move it; LinkError when it cannot be registered."""
        if self._engine.batch_register_memory(addresses, nbytes) != 0:
            raise LinkError("mooncake could not register the pool's memory; its reason is on standard error")

    def start(self, session: str, *, write: bool, own: Ints, theirs: Ints, nbytes: Ints) -> Group:
        """Start moving runs between this memory and a peer's: arrays of shape [runs], 1 to GROUP_RUNS_MAX of them.

        Blocks for the handshake when the peer is new. Raises TransferError.
        """
        submit = self._engine.batch_transfer_async_write if write else self._engine.batch_transfer_async_read
        ours, peers, sizes = own.tolist(), theirs.tolist(), nbytes.tolist()
        if not self._single:
            return Group(self._engine, [_submitted(submit(session, ours, peers, sizes))], single=False)
        batches: list[int] = []
        group = Group(self._engine, batches, single=True)
        for address, peer, size in zip(ours, peers, sizes, strict=True):
            batches.append(_submitted(submit(session, [address], [peer], [size])))
        return group

    def destroy(self) -> None:
        """End the engine: it joins its threads, so nothing is moved by it any more, whatever was under way."""
        self._engine = None  # the last reference: groups hold none once they are given up


class Group:
    """Started runs."""

    def __init__(self, engine: Any, batches: list[int], *, single: bool) -> None:
        self._engine = engine
        self._batches = batches
        self._single = single
        self._at = 0

    def done(self) -> bool:
        """Whether all runs have ended; TransferError when one failed, while others may still be under way.

        Without ``single`` (RDMA) it blocks until then: the adapters end every run, or give up, by themselves.
        """
        if not self._single:
            failed = self._engine.get_batch_transfer_status(self._batches) != 0
            self._at = len(self._batches)
            if failed:
                raise _broke()
        while self._at < len(self._batches):
            state = self._engine.transfer_check_status(self._batches[self._at])
            if state == _FAILED:
                self._at += 1
                raise _broke()
            if state != _ENDED:
                return False
            self._at += 1
        return True

    @property
    def ended(self) -> int:
        """How many of its batches are known to have ended."""
        return self._at

    def give_up(self) -> None:
        """Forget it; what is under way goes on until the engine's end."""
        self._engine = None


def _shorten_accept(port: int) -> None:
    """Let the handshake's thread look every 20 ms, not every second, whether its engine ends.

    The engine's end waits for that thread while it holds the interpreter's lock: up to 1 s in which no Python code of
    this process would run.
    """
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                continue
            copy = os.dup(number)
        except OSError:
            continue  # closed in the meantime
        with socket.socket(fileno=copy) as found:
            if found.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if listens and found.getsockname()[1] == port:
                found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, _ACCEPT_US))


def _submitted(batch: int) -> int:
    if batch == 0:
        raise TransferError("mooncake could not start the transfer: the peer's engine is gone or does not answer")
    return batch


def _broke() -> TransferError:
    return TransferError("the mooncake transfer broke: the peer's engine is gone, or the connection was lost")
