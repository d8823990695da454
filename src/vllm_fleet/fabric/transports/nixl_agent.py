"""One NIXL agent with the UCX backend: registered memory, and batches of reads and writes that are started and polled.

Uses the bindings below NIXL's ``nixl_agent`` class, because that one (nixl/_api.py) sets the progress thread's delay to
zero: an idle agent then keeps one core busy (measured with 1.5.1: 1.0 s of CPU time per second; here 0.02 s), which on
few cores makes transfers several times slower. With a delay the thread sleeps in poll(2) until UCX has something to do.
"""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np

from vllm_fleet.core.errors import ConfigError, LinkError, PeerGone
from vllm_fleet.fabric.contract import KVPool, TransferError
from vllm_fleet.fabric.plan import Ints

NONCE_BYTES = 32
_PROGRESS_DELAY_US = 1000


def bindings() -> Any:
    """NIXL's extension module; ConfigError where it is not installed."""
    try:
        importlib.import_module("nixl")
        return importlib.import_module("nixl._bindings")
    except ImportError as error:
        raise ConfigError(
            f"fabric.transports: nixl is not installed ({error}); run: pip install 'vllm-fleet[nixl]'"
        ) from error


def ucx_options(ucx: Mapping[str, str]) -> dict[str, str]:
    """Init parameters of the UCX backend for UCX settings without their UCX_ prefix.

    Raises:
        ConfigError: a value has a comma, at which the backend would cut it (ucx_utils.cpp, engine_config).
    """
    for name, value in ucx.items():
        if "," in value or "," in name or "=" in name:
            raise ConfigError(f"fabric.nixl.ucx: expected one value without a comma for {name!r}, found {value!r}")
    return {"engine_config": ",".join(f"{name}={value}" for name, value in ucx.items())} if ucx else {}


class Agent:
    """A NIXL agent for one pool and a nonce beside it.

    Safe to use from several threads, but for destroy(): nobody else may be in a call then.
    """

    def __init__(self, pool: KVPool, ucx: Mapping[str, str]) -> None:
        """Raises LinkError when the memory cannot be registered."""
        self._nixl = bindings()
        self._errors = _errors(self._nixl)
        self._kind = self._nixl.DRAM_SEG if pool.cuda is None else self._nixl.VRAM_SEG
        self._device = 0 if pool.cuda is None else pool.cuda
        self.nonce = np.frombuffer(bytearray(secrets.token_bytes(NONCE_BYTES)), np.uint8)
        self.landing = np.zeros(NONCE_BYTES, np.uint8)
        """Where peers, or this side, put the other's nonce to prove the way."""
        self._pool = pool
        settings = self._nixl.nixlAgentConfig()
        settings.useProgThread = True
        settings.useListenThread = False
        settings.pthrDelay = _PROGRESS_DELAY_US
        settings.syncMode = self._nixl.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
        self.name = f"fleet-{secrets.token_hex(8)}"
        try:
            self._agent = self._nixl.nixlAgent(self.name, settings)
            self._agent.createBackend("UCX", ucx_options(ucx))
            self._register()
            self.metadata = bytes(self._agent.getLocalMD())
        except self._errors as error:
            self._agent = None  # now, not when the error is forgotten
            raise LinkError(f"nixl cannot serve this memory: {_reason(error)}") from error

    def _register(self) -> None:
        regions = [(region.address, region.nbytes, self._device, b"") for region in self._pool.regions]
        self._agent.registerMem(self._nixl.nixlRegDList(self._kind, regions), [])
        own = [(int(array.ctypes.data), NONCE_BYTES, 0, b"") for array in (self.nonce, self.landing)]
        self._agent.registerMem(self._nixl.nixlRegDList(self._nixl.DRAM_SEG, own), [])

    def load(self, metadata: bytes) -> str:
        """Know a peer's agent from now on; its name. Raises LinkError."""
        try:
            return str(self._agent.loadRemoteMD(metadata).decode("utf-8", "replace"))
        except self._errors as error:
            raise LinkError(f"nixl cannot reach the peer's agent: {_reason(error)}") from error

    def forget(self, peer: str) -> None:
        """Close the connection to a peer's agent, if there is one."""
        try:
            self._agent.invalidateRemoteMD(peer)
        except self._errors:
            return  # it has gone already

    def start(self, peer: str, device: int, *, write: bool, own: Ints, theirs: Ints, nbytes: Ints) -> Batch:
        """Start moving runs between this pool (addresses ``own``) and a peer's: arrays of shape [runs]."""
        theirs_kind = self._nixl.DRAM_SEG if device < 0 else self._nixl.VRAM_SEG
        return self._start(
            peer,
            write,
            self._nixl.nixlXferDList(self._kind, _descriptors(own, nbytes, self._device)),
            self._nixl.nixlXferDList(theirs_kind, _descriptors(theirs, nbytes, max(device, 0))),
        )

    def start_nonce(self, peer: str, address: int, *, write: bool) -> Batch:
        """Write this agent's nonce to a peer's address, or read the peer's from there into ``landing``."""
        own = self.nonce if write else self.landing
        one = np.array([NONCE_BYTES], np.int64)
        dram = self._nixl.DRAM_SEG
        ours = self._nixl.nixlXferDList(dram, _descriptors(np.array([own.ctypes.data], np.int64), one, 0))
        theirs = self._nixl.nixlXferDList(dram, _descriptors(np.array([address], np.int64), one, 0))
        return self._start(peer, write, ours, theirs)

    def _start(self, peer: str, write: bool, own: object, theirs: object) -> Batch:
        operation = self._nixl.NIXL_WRITE if write else self._nixl.NIXL_READ
        try:
            request = self._agent.createXferReq(operation, own, theirs, peer)
        except self._errors as error:
            raise TransferError(f"nixl refused the transfer: {_reason(error)}") from error
        batch = Batch(self._nixl, self._agent, request)
        batch.post()
        return batch

    def destroy(self) -> None:
        """End the agent: its connections are closed and nothing is moved by it any more, whatever was under way."""
        self._agent = None  # the last reference: batches hold none once they are released


class Batch:
    """A started group of runs; to be released."""

    def __init__(self, nixl: Any, agent: Any, request: int) -> None:
        self._nixl = nixl
        self._errors = _errors(nixl)
        self._agent = agent
        self._request = request
        self._done = False

    def post(self) -> None:
        """Start it; UCX moves same-host memory inside this call. Raises PeerGone."""
        try:
            self._done = self._agent.postXferReq(self._request) == self._nixl.NIXL_SUCCESS
        except self._errors as error:
            self.release()
            raise _failure(error) from error

    def done(self) -> bool:
        """Whether all bytes have arrived. Raises PeerGone when the transfer failed."""
        if not self._done:
            try:
                self._done = self._agent.getXferStatus(self._request) == self._nixl.NIXL_SUCCESS
            except self._errors as error:
                raise _failure(error) from error
        return self._done

    def release(self) -> None:
        """Give it back. One that is not done is not stopped by this: UCX may move its bytes until destroy()."""
        agent, self._agent = self._agent, None
        if agent is not None:
            try:
                agent.releaseXferReq(self._request)
            except self._errors:
                return  # destroy() gives it back


def _descriptors(address: Ints, nbytes: Ints, device: int) -> Ints:
    """NIXL's descriptor list: array of shape [runs, 3] of address, length and device, C-contiguous."""
    listed = np.empty((len(address), 3), np.int64)
    listed[:, 0], listed[:, 1], listed[:, 2] = address, nbytes, device
    return listed


def _errors(nixl: Any) -> tuple[type[Exception], ...]:
    """What the bindings raise: exceptions of their own, which have no base in common but Exception."""
    own = (getattr(nixl, name) for name in dir(nixl) if name.startswith("nixl") and name.endswith("Error"))
    return (RuntimeError, ValueError, *own)


def _reason(error: Exception) -> str:
    return str(error).removeprefix("NIXL_ERR_").replace("_", " ").lower()


def _failure(error: Exception) -> PeerGone:
    if type(error).__name__ == "nixlRemoteDisconnectError":
        return TransferError("the peer's nixl agent is gone: the connection broke in the middle of a transfer")
    return TransferError(f"the nixl transfer broke: {_reason(error)}")
