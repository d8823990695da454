"""NIXL and Mooncake used directly, as their own users do: what our transports of these names are measured against.

Each class starts an owner process with a pool of its own and reads scattered blocks of it into this process, one
registered region on each side. Nothing here asks for permission, checks registrations or can be cancelled.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import logging
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vllm_fleet.core.errors import ConfigError, PeerGone
from vllm_fleet.fabric.plan import Ints

Bytes = NDArray[np.uint8]

START_S = 60.0
BATCH_RUNS_MAX = 512
_READ_S = 60.0
_SEED = 1


class Raw(Protocol):
    """An owner process, and reads of its pool."""

    name: str

    def read(self, source: Ints, target: Ints, nbytes: Ints) -> None:
        """Copy runs from offsets in the owner's pool to offsets in ``pool``: arrays of shape [runs], dtype int64."""
        ...

    def close(self) -> None: ...


class Owner:
    """A process that registers ``nbytes`` of known random bytes with a library and prints where they are."""

    def __init__(self, library: str, nbytes: int, *options: str) -> None:
        command = [sys.executable, "-m", "vllm_fleet.bench.raw", library, str(nbytes), *options]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        words = self.process.stdout.readline().split()
        if len(words) != 2:
            self.close()
            raise PeerGone(f"the owner process of {library} could not start; its reason is on standard error")
        self.address, self.place = int(words[0]), words[1]

    def close(self) -> None:
        """End the process. Safe to call twice."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def pattern(nbytes: int) -> Bytes:
    """What an owner's pool holds: array of shape [nbytes]."""
    return np.random.default_rng(_SEED).integers(0, 256, nbytes, np.uint8)


class RawNixl:
    """``nixl_agent`` with its own defaults, one transfer for each read, polled without pause.

    ``ucx``: as of NixlTransport.
    """

    def __init__(self, nbytes: int, ucx: Mapping[str, str] | None = None) -> None:
        self.name = "raw nixl" + "".join(f" {key}={value}" for key, value in (ucx or {}).items() if key == "TLS")
        options = ",".join(f"{key}={value}" for key, value in (ucx or {}).items())
        self.pool = np.zeros(nbytes, np.uint8)
        self._owner = Owner("nixl", nbytes, options)
        try:
            self._agent = _nixl_agent("reader", self.pool, options)
            self._peer = self._agent.add_remote_agent(base64.b64decode(self._owner.place))
        except BaseException:
            self._owner.close()
            raise

    def read(self, source: Ints, target: Ints, nbytes: Ints) -> None:
        """As of Raw. Raises PeerGone when the library reports an error."""
        device = np.zeros(len(nbytes), np.int64)
        own = np.stack([int(self.pool.ctypes.data) + target, nbytes, device], axis=1)
        theirs = np.stack([self._owner.address + source, nbytes, device], axis=1)
        agent = self._agent
        descriptors = (agent.get_xfer_descs(own, "DRAM"), agent.get_xfer_descs(theirs, "DRAM"))
        handle = agent.initialize_xfer("READ", *descriptors, self._peer)
        state, until = agent.transfer(handle), time.monotonic() + _READ_S
        while state == "PROC" and time.monotonic() < until:
            state = agent.check_xfer_state(handle)
        agent.release_xfer_handle(handle)
        if state != "DONE":
            raise PeerGone(f"raw nixl ended in state {state}")

    def close(self) -> None:
        """End both sides. Safe to call twice."""
        self._agent = None
        self._owner.close()


class RawMooncake:
    """``batch_transfer_sync_read`` over TCP, BATCH_RUNS_MAX runs at a time."""

    def __init__(self, nbytes: int) -> None:
        self.name = "raw mooncake"
        self.pool = np.zeros(nbytes, np.uint8)
        self._owner = Owner("mooncake", nbytes)
        try:
            self._engine = _mooncake_engine(self.pool)
        except BaseException:
            self._owner.close()
            raise

    def read(self, source: Ints, target: Ints, nbytes: Ints) -> None:
        """As of Raw. Raises PeerGone when the library reports an error."""
        own = (int(self.pool.ctypes.data) + target).tolist()
        theirs, sizes = (self._owner.address + source).tolist(), nbytes.tolist()
        for start in range(0, len(sizes), BATCH_RUNS_MAX):
            part = slice(start, start + BATCH_RUNS_MAX)
            if self._engine.batch_transfer_sync_read(self._owner.place, own[part], theirs[part], sizes[part]) != 0:
                raise PeerGone("raw mooncake reported an error")

    def close(self) -> None:
        """End both sides. Safe to call twice."""
        self._engine = None
        self._owner.close()


def _nixl_agent(name: str, pool: Bytes, options: str) -> Any:
    try:
        library = importlib.import_module("nixl._api")
    except ImportError as error:
        raise ConfigError(f"nixl is not installed ({error}); run: pip install 'vllm-fleet[nixl]'") from error
    logging.getLogger(library.logger.name).setLevel(logging.WARNING)
    agent = library.nixl_agent(name, library.nixl_agent_config(backends=[]))
    agent.create_backend("UCX", {"engine_config": options} if options else {})
    region = [(int(pool.ctypes.data), pool.nbytes, 0, "")]
    agent.register_memory(agent.get_reg_descs(region, "DRAM"))
    return agent


def _mooncake_engine(pool: Bytes) -> Any:
    try:
        library = importlib.import_module("mooncake.engine")
    except ImportError as error:
        raise ConfigError(f"mooncake cannot be loaded ({error}); run: pip install 'vllm-fleet[mooncake]'") from error
    engine = library.TransferEngine()
    if engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") != 0:
        raise PeerGone("mooncake could not start; its reason is on standard error")
    if engine.register_memory(int(pool.ctypes.data), pool.nbytes) != 0:
        raise PeerGone("mooncake could not register memory; its reason is on standard error")
    return engine


def main() -> None:
    """The owner process: ``nixl|mooncake NBYTES [UCX options]``; lives until its standard input ends."""
    library, pool = sys.argv[1], pattern(int(sys.argv[2]))
    if library == "nixl":
        agent = _nixl_agent("owner", pool, sys.argv[3])
        place = base64.b64encode(agent.get_agent_metadata()).decode()
    else:
        engine = _mooncake_engine(pool)
        place = f"127.0.0.1:{engine.get_rpc_port()}"
    print(int(pool.ctypes.data), place, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
