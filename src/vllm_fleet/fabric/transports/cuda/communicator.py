"""NCCL through nccl4py: blocking communicators, ended by abort. Errors are FleetErrors.

From nccl4py 0.6 (nccl/core/communicator.py, nccl/bindings/nccl.pyx) and NCCL's user guide: joining and the first send
or receive of a direction wait for the peer, out of reach of a deadline, so they run in threads of their own
(joining.py); later ones only enqueue. (A non-blocking communicator spends 80 us per call on a thread.) abort() may come
from another thread while a call waits; it is local, ends kernels that wait for a peer, and frees the communicator.
NCCL opens sockets of its own for the handshake, on the interface that its NCCL_SOCKET_IFNAME names.
"""

from __future__ import annotations

import importlib

from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import LinkError
from vllm_fleet.fabric.contract import TransferError
from vllm_fleet.fabric.rendezvous import Meeting, Rendezvous
from vllm_fleet.fabric.transports.cuda import joining
from vllm_fleet.fabric.transports.cuda.joining import Joining, Watch, library, mapped, poll, run_apart
from vllm_fleet.fabric.transports.cuda.nccl_tuning import Tuning

__all__ = ["Communicator", "mapped", "poll"]

_SUCCESS, _UINT8 = 0, 1  # ncclResult_t and ncclDataType_t, nccl.h


class Communicator:
    """This process's half of communicators of two, one for each lane. For one thread, its CUDA device current there."""

    def __init__(self, rendezvous: Rendezvous, device: int, tuning: Tuning, watch: Watch, deadline: Deadline) -> None:
        """Meet the peer and join.

        Raises:
            LinkError, DeadlineExceeded: the peer refused or did not come. The thread that joins is left behind until
                the peer has come after all, or NCCL hears that it is gone.
        """
        self._nccl = library()
        self._calls = importlib.import_module("nccl.bindings.nccl")
        self._device, self._lanes = device, tuning.lanes
        meeting = self._meet(rendezvous, tuning, deadline)
        self._peer = 1 - meeting.rank
        self._joining = Joining(meeting, tuning)
        try:
            with mapped("joining the NCCL communicator"):
                made = run_apart(self._joining.join, device, watch, deadline, "joining over NCCL")
                self._comms = [self._calls.Comm(one.ptr) for one in made]
            poll(lambda: rendezvous.joined(meeting), watch, deadline, "the peer", "joining over NCCL")
        except BaseException:
            self.abort()
            raise

    def _meet(self, rendezvous: Rendezvous, tuning: Tuning, deadline: Deadline) -> Meeting:
        ids: list[bytes] = []

        def create() -> bytes:
            ids.append(self._create_id())
            return ids[0]

        try:
            return rendezvous.meet(create, deadline)
        except BaseException as error:
            if ids and isinstance(error, LinkError):
                joining.call_off(ids[0], self._device, tuning)
            elif ids:  # the peer may have agreed, and come
                joining.come_and_leave(Meeting(rank=0, ranks=2, epoch=0, group_id=ids[0]), self._device, tuning)
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

    def group_start(self) -> None:
        """What is sent and received from here to group_end() starts together; each lane's part as one kernel."""
        self._calls.group_start()

    def group_end(self) -> None:
        self._calls.group_end()

    def register(self, address: int, nbytes: int) -> None:
        """Register device memory, for as long as the communicator is, so that NCCL need not copy it on its way."""
        with mapped("ncclCommRegister"):
            for comm in self._comms:
                self._calls.comm_register(comm, address, nbytes)

    def exchange(
        self, sent: int, received: int, nbytes: int, stream: int, watch: Watch, deadline: Deadline, lane: int = 0
    ) -> None:
        """Connect both directions: enqueue sending ``nbytes`` at the address ``sent``, and receiving as many."""

        def both() -> None:
            self.group_start()
            try:
                self.send(sent, nbytes, stream, lane)
                self.receive(received, nbytes, stream, lane)
            finally:
                self.group_end()

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
        """End what is in flight and free the communicator. Safe to call twice.

        Raises nothing, since there is no other way out. Kernels end as soon as NCCL has set its flag for them; freeing
        may take longer, and is left to its thread when it takes longer than ABORT_S.
        """
        self._joining.give_up()

    def _create_id(self) -> bytes:
        with mapped("ncclGetUniqueId"):
            return b"".join(bytes(self._nccl.get_unique_id()) for _ in range(self._lanes))
