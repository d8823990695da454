"""Groups over gloo, which torch brings along: CPU tensors, between any hosts.

Found out with torch 2.13: a process group's abort() and shutdown() do nothing, and a call that waits for a peer that
hangs ends at its timeout only (a peer that died, or dropped its group, ends it at once). So calls are made on a thread
of the communicator's own, with the caller's deadline as their timeout, and from and into memory of its own: whoever
gives up leaves at once, nothing is written to his tensor any more, and the thread ends at that deadline at the latest.

The id is the address of a TCPStore that rank 0 serves, and a prefix that nobody can guess. The store asks nobody for a
token, and neither do gloo's own sockets: ``host`` should be an address that only the fleet reaches.
"""

from __future__ import annotations

import contextlib
import queue
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from datetime import timedelta
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta, Struct
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore

from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import BadRequest, Corrupt, FleetError
from vllm_fleet.fabric.contract import TransferError
from vllm_fleet.fabric.groups.contract import Watch
from vllm_fleet.fabric.rendezvous import Meeting
from vllm_fleet.net import sockets
from vllm_fleet.wire.names import DECODE_ERRORS, Port

PIECE_BYTES = 16 << 20
"""Tensors go in pieces of this size, each through memory of the communicator's own."""
LATE_S = 0.2
"""gloo's timeouts are so much later than the deadline that they stand for: who waited too long hears it from us."""
LOOK_S = 0.01
"""A waiting caller looks so often whether the epoch is over."""
STORE_S = 30.0
"""A store's own calls end after this time."""


class StoreAddress(Struct, frozen=True):
    """The id of a group."""

    host: Annotated[str, Meta(min_length=1, max_length=255)]
    port: Port
    prefix: Annotated[str, Meta(min_length=1, max_length=64)]


class GlooBackend:
    """A Backend. ``host``: the address of this worker that the others reach."""

    name = "gloo"

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._host = host
        self._served: dict[bytes, Any] = {}
        """Stores of ids that are made and not used yet."""

    def create_id(self) -> bytes:
        listener = sockets.listen(self._host, 0, setting="the group's host")
        port = listener.getsockname()[1]
        with _mapped("serving a store"):
            store = TCPStore(
                self._host,
                port,
                is_master=True,
                timeout=timedelta(seconds=STORE_S),
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )
        group_id = msgspec.msgpack.encode(StoreAddress(self._host, port, secrets.token_hex(16)))
        self._served[group_id] = store
        return group_id

    def discard(self, group_id: bytes) -> None:
        self._served.pop(group_id, None)

    def join(self, meeting: Meeting, watch: Watch, deadline: Deadline) -> GlooCommunicator:
        try:
            address = msgspec.msgpack.decode(meeting.group_id, type=StoreAddress)
        except DECODE_ERRORS as error:
            raise Corrupt(f"the id of the group is no address of a store: {error}") from error
        store = self._served.pop(meeting.group_id, None)
        made = GlooCommunicator(self._host, meeting)
        try:
            made.connect(address, store, watch, deadline)
        except BaseException:
            made.abort()
            raise
        return made


_alive = 0
_alive_lock = threading.Lock()


def threads_alive() -> int:
    """Communicators' threads, those included that nobody waits for any more."""
    return _alive


class GlooCommunicator:
    """A Communicator; its thread owns the process group."""

    def __init__(self, host: str, meeting: Meeting) -> None:
        global _alive
        self._host, self._meeting = host, meeting
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], Future[None]] | None] = queue.SimpleQueue()
        self._aborted = False
        self._group: Any = None
        self._staging = torch.empty(0, dtype=torch.uint8)
        with _alive_lock:
            _alive += 1
        threading.Thread(target=self._work, name="fleet-gloo", daemon=True).start()

    def connect(self, address: StoreAddress, store: Any, watch: Watch, deadline: Deadline) -> None:
        """Join; ``store``: the one that this worker serves."""
        meeting = self._meeting

        def work() -> None:
            left = _left(deadline)
            held = store
            if held is None:
                held = TCPStore(address.host, address.port, is_master=False, timeout=left, wait_for_workers=False)
            options = ProcessGroupGloo._Options()
            options._timeout = left
            options._devices = [ProcessGroupGloo.create_device(hostname=self._host, lazy_init=False)]
            self._group = ProcessGroupGloo(PrefixStore(address.prefix, held), meeting.rank, meeting.ranks, options)

        self._apart(work, watch, deadline, "joining over gloo")

    def broadcast(self, tensor: torch.Tensor, root: int, watch: Watch, deadline: Deadline) -> None:
        gives = root == self._meeting.rank

        def move(piece: torch.Tensor) -> None:
            options = BroadcastOptions()
            options.rootRank, options.rootTensor = root, 0
            options.timeout = _left(deadline)
            self._group.broadcast([piece], options).wait()

        self._in_pieces(tensor, move, gives, not gives, watch, deadline, "a broadcast")

    def send(self, tensor: torch.Tensor, to: int, watch: Watch, deadline: Deadline) -> None:
        def move(piece: torch.Tensor) -> None:
            self._group.send([piece], to, 0).wait(_left(deadline))

        self._in_pieces(tensor, move, True, False, watch, deadline, "sending")

    def receive(self, tensor: torch.Tensor, source: int, watch: Watch, deadline: Deadline) -> None:
        def move(piece: torch.Tensor) -> None:
            self._group.recv([piece], source, 0).wait(_left(deadline))

        self._in_pieces(tensor, move, False, True, watch, deadline, "receiving")

    def abort(self) -> None:
        self._aborted = True
        self._jobs.put(None)

    def _in_pieces(
        self,
        tensor: torch.Tensor,
        move: Callable[[torch.Tensor], None],
        gives: bool,
        takes: bool,
        watch: Watch,
        deadline: Deadline,
        what: str,
    ) -> None:
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise BadRequest(f"gloo needs contiguous tensors in CPU memory, and this one is on {tensor.device}")
        content = tensor.detach().reshape(-1).view(torch.uint8)
        if self._staging.numel() < min(content.numel(), PIECE_BYTES):
            self._staging = torch.empty(min(content.numel(), PIECE_BYTES), dtype=torch.uint8)
        for start in range(0, content.numel(), PIECE_BYTES):
            part = content[start : start + PIECE_BYTES]
            piece = self._staging[: part.numel()]
            if gives:
                piece.copy_(part)
            self._apart(lambda piece=piece: move(piece), watch, deadline, what)  # type: ignore[misc]
            if takes:
                part.copy_(piece)

    def _apart(self, call: Callable[[], None], watch: Watch, deadline: Deadline, what: str) -> None:
        """Let the thread do something; raise what it raises, what ``watch`` raises, or DeadlineExceeded."""
        ended: Future[None] = Future()
        self._jobs.put((call, ended))
        while True:
            watch()
            deadline.check("the others", f"{what} over gloo")
            with contextlib.suppress(FutureTimeout), _mapped(what):
                return ended.result(LOOK_S)

    def _work(self) -> None:
        global _alive
        try:
            while (job := self._jobs.get()) is not None and not self._aborted:
                call, ended = job
                try:
                    call()
                except Exception as error:  # noqa: BLE001 - raised in the caller's thread
                    ended.set_exception(error)
                else:
                    ended.set_result(None)
        finally:
            self._group = None  # closes its sockets, so that the others' calls end
            with _alive_lock:
                _alive -= 1


def _left(deadline: Deadline) -> timedelta:
    return timedelta(seconds=deadline.remaining() + LATE_S)


@contextlib.contextmanager
def _mapped(what: str) -> Iterator[None]:
    """Errors of torch as TransferErrors."""
    try:
        yield
    except (FleetError, FutureTimeout):
        raise
    except RuntimeError as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TransferError(f"{what} over gloo failed: {text[:200]}") from error
