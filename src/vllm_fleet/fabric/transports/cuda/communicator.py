"""NCCL through nccl4py: blocking communicators, ended by abort. Errors are FleetErrors.

From nccl4py 0.6 (nccl/core/communicator.py, nccl/bindings/nccl.pyx) and NCCL's user guide: joining and the first send
or receive of a direction wait for the peer, out of reach of a deadline, so they run in threads of their own; later ones
only enqueue. (A non-blocking communicator spends 80 us per call on a thread.) abort() may come from another thread
while a call waits; it is local, ends kernels that wait for a peer, and frees the communicator.
NCCL opens sockets of its own for the handshake, on the interface that its NCCL_SOCKET_IFNAME names.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from vllm_fleet.core import limits
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import BadRequest, FleetError, LinkError
from vllm_fleet.fabric.contract import TransferError
from vllm_fleet.fabric.rendezvous import Rendezvous

T = TypeVar("T")

Watch = Callable[[], None]
"""Called while waiting; raises the FleetError that ends the wait."""

SPIN_S = 0.005
"""A wait polls without pause for so long (a transfer of 1 GiB takes 3 ms), then every NAP_S."""
NAP_S = 0.0002

ABORT_S = 5.0

_SUCCESS, _UINT8 = 0, 1  # ncclResult_t and ncclDataType_t, nccl.h

EXTRA = "pip install 'vllm-fleet[nccl]'"


def library() -> Any:
    """The module nccl.core. LinkError, naming what to install, when it or CUDA is missing."""
    try:
        import torch
    except ImportError as error:
        raise LinkError(f"nccl needs torch with CUDA, which cannot be imported: {error}; {EXTRA}") from error
    if not torch.cuda.is_available():
        raise LinkError("nccl needs torch with CUDA and a CUDA device, and torch sees none")
    try:
        return importlib.import_module("nccl.core")
    except ImportError as error:
        raise LinkError(f"nccl needs the package nccl4py, which cannot be imported: {error}; {EXTRA}") from error


@contextlib.contextmanager
def mapped(what: str) -> Iterator[None]:
    """Errors of NCCL and CUDA as TransferErrors; ``what`` failed."""
    try:
        yield
    except FleetError:
        raise
    except Exception as error:  # NCCLError and NcclInvalid derive from Exception only
        raise TransferError(f"{what} failed: {type(error).__name__}: {error}") from error


def poll(done: Callable[[], bool], watch: Watch, deadline: Deadline, who: str, what: str) -> None:
    """Wait until ``done()``. Raises what ``watch`` raises, and DeadlineExceeded naming ``who`` and ``what``."""
    began = time.monotonic()
    while not done():
        watch()
        deadline.check(who, what)
        time.sleep(0 if time.monotonic() - began < SPIN_S else NAP_S)


BUFFERS_MAX = 32


@dataclass(frozen=True)
class Tuning:
    """How a link stages. Both sides use the asking side's ``chunk_bytes``, ``ctas_max`` and ``lanes``."""

    chunk_bytes: int = 15 << 20
    buffers: int = 4
    ctas_max: int = 16
    """Most multiprocessors that NCCL's kernel takes, in each lane. With other numbers on the two sides the first
    message fails (internal error, NCCL 2.28.9)."""

    lanes: int = 2
    """Communicators, used in turn, so that one's message may start while another's ends. Two of 16 CTAs moved 4 GiB at
    282 GB/s, one of 32 at 234 (2 x H200, docs/benchmarks/2026-11-21-gpu-nccl.json)."""

    def __post_init__(self) -> None:
        if not 1 <= self.lanes <= limits.NCCL_LANES_MAX:
            raise BadRequest(f"{self.lanes} lanes: need 1 to {limits.NCCL_LANES_MAX}")
        if not 2 <= self.buffers <= BUFFERS_MAX or self.chunk_bytes * self.buffers > limits.NCCL_STAGING_BYTES_MAX:
            raise BadRequest(
                f"{self.buffers} staging buffers of {self.chunk_bytes} bytes: need 2 to {BUFFERS_MAX}, and "
                f"{limits.NCCL_STAGING_BYTES_MAX} bytes at most"
            )


_apart = 0
_apart_lock = threading.Lock()


def calls_apart() -> int:
    """Threads that wait inside NCCL for a peer, those included that nobody waits for any more."""
    return _apart


def run_apart(call: Callable[[], T], device: int, watch: Watch, deadline: Deadline, what: str) -> T:
    """Carry out a call that may block for longer than it should in a thread of its own, on a CUDA device.

    Raises what it raises, what ``watch`` raises, and DeadlineExceeded; the thread then goes on until NCCL lets it.
    """
    import torch

    ended: Future[T] = Future()

    def work() -> None:
        global _apart
        with _apart_lock:
            _apart += 1
        try:
            with torch.cuda.device(device):
                result = call()
        except BaseException as error:  # noqa: BLE001 - raised in the waiting thread
            ended.set_exception(error)
        else:
            ended.set_result(result)
        finally:
            with _apart_lock:
                _apart -= 1

    threading.Thread(target=work, name="fleet-nccl-call", daemon=True).start()
    poll(ended.done, watch, deadline, "the peer", what)
    return ended.result()


class Communicator:
    """This process's half of communicators of two, one for each lane. For one thread, its CUDA device current there."""

    def __init__(self, rendezvous: Rendezvous, device: int, tuning: Tuning, watch: Watch, deadline: Deadline) -> None:
        """Meet the peer and join.

        Raises:
            LinkError, DeadlineExceeded: the peer refused or did not come. The thread that joins may be left behind,
                until NCCL hears that the peer is gone.
        """
        self._nccl = library()
        self._calls = importlib.import_module("nccl.bindings.nccl")
        self._device, self._lanes = device, tuning.lanes
        meeting = rendezvous.meet(self._create_id, deadline)
        self._peer = 1 - meeting.rank
        config = self._nccl.NCCLConfig(blocking=True, max_ctas=tuning.ctas_max)
        self._made: list[Any] = []
        """The communicators until somebody takes them out to abort them."""
        given_up = threading.Event()

        def join() -> None:
            for start in range(0, len(meeting.group_id), limits.NCCL_ID_BYTES):
                one = meeting.group_id[start : start + limits.NCCL_ID_BYTES]
                unique_id = self._nccl.UniqueId.from_bytes(one)
                self._made.append(self._nccl.Communicator.init(meeting.ranks, meeting.rank, unique_id, config))
                if given_up.is_set():
                    self._abort()
                    return

        try:
            with mapped("joining the NCCL communicator"):
                run_apart(join, device, watch, deadline, "joining over NCCL")
                self._comms = [self._calls.Comm(made.ptr) for made in self._made]
            poll(lambda: rendezvous.joined(meeting), watch, deadline, "the peer", "joining over NCCL")
        except BaseException:
            given_up.set()
            self.abort()
            raise

    @property
    def lanes(self) -> int:
        """How many communicators there are."""
        return len(self._comms)

    def send(self, address: int, nbytes: int, stream: int, lane: int = 0) -> None:
        """Enqueue sending device memory on a stream. Only after exchange() in this lane, which connects."""
        self._calls.send(address, nbytes, _UINT8, self._peer, self._comms[lane], stream)

    def receive(self, address: int, nbytes: int, stream: int, lane: int = 0) -> None:
        """Enqueue receiving into device memory, as with send()."""
        self._calls.recv(address, nbytes, _UINT8, self._peer, self._comms[lane], stream)

    def exchange(
        self, sent: int, received: int, nbytes: int, stream: int, watch: Watch, deadline: Deadline, lane: int = 0
    ) -> None:
        """Connect both directions: enqueue sending ``nbytes`` at the address ``sent``, and receiving as many."""

        def both() -> None:
            self._calls.group_start()
            try:
                self.send(sent, nbytes, stream, lane)
                self.receive(received, nbytes, stream, lane)
            finally:
                self._calls.group_end()

        with mapped("connecting over NCCL"):
            run_apart(both, self._device, watch, deadline, "connecting over NCCL")

    def check(self) -> None:
        """Raises TransferError when NCCL has failed since the last call."""
        with mapped("NCCL"):
            for comm in self._comms:
                state = int(self._calls.comm_get_async_error(comm))
                if state != _SUCCESS:
                    raise TransferError(f"NCCL failed: {self._nccl.get_error_string(state)} ({state})")

    def abort(self) -> None:
        """End what is in flight and free the communicator.

        Raises nothing, since there is no other way out. Kernels end as soon as NCCL has set its flag for them; freeing
        may take longer, and is left to its thread when it takes longer than ABORT_S.
        """
        if self._made:
            # At once: freeing one may wait for the kernels of another, which end by its own abort.
            threads = [threading.Thread(target=self._abort, name="fleet-nccl-abort", daemon=True) for _ in self._made]
            for thread in threads:
                thread.start()
            until = time.monotonic() + ABORT_S
            for thread in threads:
                thread.join(max(0.0, until - time.monotonic()))

    def _abort(self) -> None:
        try:
            handle = self._made.pop()
        except IndexError:  # another thread took it
            return
        with contextlib.suppress(TransferError), mapped("ncclCommAbort"):
            handle.abort()

    def _create_id(self) -> bytes:
        with mapped("ncclGetUniqueId"):
            return b"".join(bytes(self._nccl.get_unique_id()) for _ in range(self._lanes))
