"""What a library must offer so that groups can communicate through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from vllm_fleet.core.deadline import Deadline
from vllm_fleet.fabric.rendezvous import Meeting

Watch = Callable[[], None]
"""Called while waiting; raises the FleetError that ends the wait."""

TensorIn = TypeVar("TensorIn", contravariant=True)


class Communicator(Protocol[TensorIn]):
    """This worker's part in one epoch. For one thread, but for abort().

    Calls return when this worker's tensor has been sent, or received in full. They raise TransferError when the library
    fails, DeadlineExceeded, what ``watch`` raises, and BadRequest for a tensor that cannot be used; after all but the
    last the communicator must be aborted. All members must make the same calls, with tensors of equally many bytes.
    """

    def broadcast(self, tensor: TensorIn, root: int, watch: Watch, deadline: Deadline) -> None:
        """Fill the tensors of all members from that of rank ``root``."""
        ...

    def send(self, tensor: TensorIn, to: int, watch: Watch, deadline: Deadline) -> None:
        """Give a tensor to the member of rank ``to``, who receives it."""
        ...

    def receive(self, tensor: TensorIn, source: int, watch: Watch, deadline: Deadline) -> None:
        """Fill a tensor with what the member of rank ``source`` sends."""
        ...

    def abort(self) -> None:
        """End what is in flight and give everything back; no tensor is written to once it has returned. Safe to call
        twice, and from any thread. Does not wait for peers.
        """
        ...


class Backend(Protocol[TensorIn]):
    """Makes communicators. What it raises: TransferError, LinkError or ConfigError, and DeadlineExceeded."""

    name: str

    def create_id(self) -> bytes:
        """The id of a new communicator, made by its rank 0."""
        ...

    def join(self, meeting: Meeting, watch: Watch, deadline: Deadline) -> Communicator[TensorIn]:
        """Join, when all members come. Nothing is left behind for ever when they do not."""
        ...

    def discard(self, group_id: bytes) -> None:
        """Give back what create_id() made, when nobody will join under it, or joining has failed. Does not wait."""
        ...
