"""Groups over NCCL: CUDA tensors, each member on a GPU of its own.

Non-blocking communicators: joining is begun, looked at and, at the deadline or when the epoch ends, aborted. Some of
it blocks all the same (the first use of NCCL in a process), so it is begun in a thread apart (cuda/joining.py). From
NCCL's src/bootstrap.cc: whoever makes an id serves it, with a thread and a socket, until all ranks have come or one
comes that does not fit; so an id that failed is dismissed by a rank that does not fit.
NCCL asks nobody for a token on its own
sockets: NCCL_SOCKET_IFNAME should name a network that only the fleet reaches.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from vllm_fleet.core import limits
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import BadRequest, Corrupt, FleetError
from vllm_fleet.fabric.contract import TransferError
from vllm_fleet.fabric.groups.contract import Watch
from vllm_fleet.fabric.rendezvous import Meeting
from vllm_fleet.fabric.transports.cuda.joining import ABORT_S, library, mapped, poll, run_apart

_SUCCESS, _IN_PROGRESS, _UINT8 = 0, 7, 1  # ncclResult_t and ncclDataType_t, nccl.h

DISMISS_S = 2.0
"""An id that nobody will join under is served for so long at most."""


class NcclBackend:
    """A Backend. ``device``: this worker's GPU, which no other member of the group uses.

    Raises LinkError, saying what to install, where CUDA or nccl4py is missing.
    """

    name = "nccl"

    def __init__(self, device: int) -> None:
        self._nccl, self._device = library(), device

    def create_id(self) -> bytes:
        with mapped("ncclGetUniqueId"):
            return bytes(self._nccl.get_unique_id())

    def join(self, meeting: Meeting, watch: Watch, deadline: Deadline) -> NcclCommunicator:
        if len(meeting.group_id) != limits.NCCL_ID_BYTES:
            raise Corrupt(f"the id of the group has {len(meeting.group_id)} bytes, NCCL's have {limits.NCCL_ID_BYTES}")
        making = _Making(self._nccl, self._device, meeting)
        try:
            run_apart(making.begin, self._device, watch, deadline, "joining over NCCL")
            poll(making.is_ready, watch, deadline, "the others", "joining over NCCL")
        except BaseException:
            making.abort()
            raise
        return NcclCommunicator(making, self._device)

    def discard(self, group_id: bytes) -> None:
        def work() -> None:
            making = _Making(self._nccl, self._device, Meeting(0, 1, 0, group_id))
            with contextlib.suppress(FleetError), torch.cuda.device(self._device):
                making.begin()
                deadline = Deadline.after(DISMISS_S, "fabric.transports.group_nccl.DISMISS_S")
                poll(making.is_ready, _nothing, deadline, "NCCL", "dismissing an id")
            making.abort()

        threading.Thread(target=work, name="fleet-nccl-dismiss", daemon=True).start()


class _Making:
    """One non-blocking communicator of nccl4py, from before it is made until it is aborted."""

    def __init__(self, nccl: Any, device: int, meeting: Meeting) -> None:
        self._nccl, self._device, self._meeting = nccl, device, meeting
        self._lock = threading.Lock()
        self._aborted = False
        self._made: Any = None

    def begin(self) -> None:
        """Start joining; the device is current."""
        meeting = self._meeting
        with mapped("joining the NCCL communicator"):
            made = self._nccl.Communicator.init(
                meeting.ranks,
                meeting.rank,
                self._nccl.UniqueId.from_bytes(meeting.group_id),
                self._nccl.NCCLConfig(blocking=False),
            )
        with self._lock:
            self._made, aborted = made, self._aborted
        if aborted:
            self.abort()

    def is_ready(self) -> bool:
        """Whether what was asked of it last is under way. TransferError when NCCL failed."""
        made = self._made
        if made is None:
            raise TransferError("the NCCL communicator was aborted")
        with mapped("NCCL"):
            state = int(made.get_async_error())
            if state not in (_SUCCESS, _IN_PROGRESS):
                raise TransferError(f"NCCL failed: {self._nccl.get_error_string(state)} ({state})")
        return state == _SUCCESS

    @property
    def pointer(self) -> int:
        return int(self._made.ptr)

    def abort(self) -> None:
        """End what is in flight, in a thread apart: freeing may take longer than ABORT_S, and is left to it then."""
        with self._lock:
            self._aborted = True
            made, self._made = self._made, None
        if made is None:
            return

        def work() -> None:
            with contextlib.suppress(TransferError), torch.cuda.device(self._device), mapped("ncclCommAbort"):
                made.abort()

        thread = threading.Thread(target=work, name="fleet-nccl-abort", daemon=True)
        thread.start()
        thread.join(ABORT_S)


class NcclCommunicator:
    """A Communicator. Tensors are used as the current stream of their device leaves them."""

    def __init__(self, making: _Making, device: int) -> None:
        self._making, self._device = making, device
        self._calls = importlib.import_module("nccl.bindings.nccl")
        self._comm = self._calls.Comm(making.pointer)
        self._stream = torch.cuda.Stream(device)

    def broadcast(self, tensor: torch.Tensor, root: int, watch: Watch, deadline: Deadline) -> None:
        def start(at: int, nbytes: int, stream: int) -> None:
            self._calls.broadcast(at, at, nbytes, _UINT8, root, self._comm, stream)

        self._do(tensor, start, watch, deadline, "a broadcast")

    def send(self, tensor: torch.Tensor, to: int, watch: Watch, deadline: Deadline) -> None:
        def start(at: int, nbytes: int, stream: int) -> None:
            self._calls.send(at, nbytes, _UINT8, to, self._comm, stream)

        self._do(tensor, start, watch, deadline, "sending")

    def receive(self, tensor: torch.Tensor, source: int, watch: Watch, deadline: Deadline) -> None:
        def start(at: int, nbytes: int, stream: int) -> None:
            self._calls.recv(at, nbytes, _UINT8, source, self._comm, stream)

        self._do(tensor, start, watch, deadline, "receiving")

    def abort(self) -> None:
        self._making.abort()

    def _do(
        self,
        tensor: torch.Tensor,
        start: Callable[[int, int, int], None],
        watch: Watch,
        deadline: Deadline,
        what: str,
    ) -> None:
        if tensor.device != torch.device("cuda", self._device) or not tensor.is_contiguous():
            raise BadRequest(
                f"NCCL needs contiguous tensors on cuda:{self._device}, and this one is on {tensor.device}"
            )
        nbytes = tensor.numel() * tensor.element_size()
        if not nbytes:
            return

        with torch.cuda.device(self._device):
            done = torch.cuda.Event()
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with mapped(what):
                start(tensor.data_ptr(), nbytes, self._stream.cuda_stream)
            poll(self._making.is_ready, watch, deadline, "the others", f"{what} over NCCL")
            done.record(self._stream)
            look_at = time.monotonic()

            def ended() -> bool:
                nonlocal look_at
                if time.monotonic() >= look_at:  # a peer's death shows there, and asking takes a moment
                    look_at = time.monotonic() + 0.01
                    self._making.is_ready()
                return bool(done.query())

            poll(ended, watch, deadline, "the others", f"{what} over NCCL")


def _nothing() -> None:
    pass
