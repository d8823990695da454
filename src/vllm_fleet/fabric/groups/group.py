"""A group of workers that do things together, epoch after epoch, without restarting anybody."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Generic, TypeVar

from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import BadRequest, DeadlineExceeded, FleetError, PeerGone
from vllm_fleet.fabric.groups.contract import Backend, Communicator, Watch
from vllm_fleet.fabric.groups.controlled import ControllerRendezvous
from vllm_fleet.fabric.rendezvous import EpochEnded, Meeting

NAP_S = 0.001
PAUSE_S_MIN, PAUSE_S_MAX = 0.05, 1.0
"""Between two attempts to join that failed here; doubles."""

T = TypeVar("T")
Tensor = TypeVar("Tensor")


class Group(Generic[Tensor]):
    """This worker's part in a group. For one thread; close it in the end.

    ``form`` joins the others; then all make the same calls. Whoever dies, fails, leaves or joins ends the epoch: calls
    raise EpochEnded, everywhere, and ``form`` makes the next one. What was received in a call that raised is undefined.
    """

    def __init__(self, rendezvous: ControllerRendezvous, backend: Backend[Tensor]) -> None:
        self._rendezvous, self._backend = rendezvous, backend
        self._formed: tuple[Meeting, Communicator[Tensor]] | None = None

    @property
    def meeting(self) -> Meeting:
        """Rank, names of the members and number of the epoch; EpochEnded when there is none."""
        return self._present()[0]

    def form(self, deadline: Deadline) -> Meeting:
        """The epoch that this worker is in, or the next one that forms.

        Raises:
            DeadlineExceeded: it did not form in time; says who is missing, or what failed last.
            Fenced: a later life of this member has come.
            BadRequest, ConfigError: what was asked, or the library here, cannot work.
        """
        pause_s = PAUSE_S_MIN
        while True:
            try:
                self.check()
                return self.meeting
            except EpochEnded:
                pass
            try:
                self._join(deadline)
            except EpochEnded:
                deadline.check(f"group {self._rendezvous.group}", "forming")
            except PeerGone as error:
                if deadline.expired():
                    raise
                time.sleep(min(pause_s, deadline.remaining()))
                pause_s = min(2 * pause_s, PAUSE_S_MAX)
                deadline.check(f"group {self._rendezvous.group}", f"forming (the last attempt: {error})")

    def run(self, work: Callable[[Meeting], T], deadline: Deadline) -> T:
        """Carry ``work`` out in an epoch; in the next one, from its start, when that one ends before it is done."""
        while True:
            meeting = self.form(deadline)
            try:
                return work(meeting)
            except EpochEnded:
                deadline.check(f"group {self._rendezvous.group}", "what it does together")

    def broadcast(self, tensor: Tensor, root: int, deadline: Deadline) -> None:
        """Fill the tensors of all members from that of rank ``root``; see Communicator for what it raises."""
        rank = self._present()[0].rank
        self._do(lambda made, watch: made.broadcast(tensor, root, watch, deadline), None if rank == root else root)

    def send(self, tensor: Tensor, to: int, deadline: Deadline) -> None:
        """Give a tensor to the member of rank ``to``."""
        self._do(lambda made, watch: made.send(tensor, to, watch, deadline), to)

    def receive(self, tensor: Tensor, source: int, deadline: Deadline) -> None:
        """Fill a tensor with what the member of rank ``source`` sends."""
        self._do(lambda made, watch: made.receive(tensor, source, watch, deadline), source)

    def check(self) -> None:
        """Raise EpochEnded when there is no epoch, or it is over; for members that wait for nobody at the moment."""
        meeting, communicator = self._present()
        try:
            self._rendezvous.check(meeting)
        except EpochEnded:
            self._formed = None
            communicator.abort()
            raise

    def close(self) -> None:
        """Leave the group: the others form the next epoch without this worker."""
        formed, self._formed = self._formed, None
        if formed is not None:
            formed[1].abort()
        self._rendezvous.close()

    def _join(self, deadline: Deadline) -> None:
        """One attempt at the next epoch."""
        unused: list[bytes] = []

        def create() -> bytes:
            unused.append(self._backend.create_id())
            return unused[-1]

        meeting: Meeting | None = None
        try:
            meeting = self._rendezvous.meet(create, deadline)
            communicator = self._enter(meeting, deadline)
            unused = [one for one in unused if one != meeting.group_id]
        except FleetError as error:
            if meeting is not None and not isinstance(error, EpochEnded):
                self._rendezvous.failed(meeting, f"{self._backend.name}: {error}")
            raise
        finally:
            for group_id in unused:
                self._backend.discard(group_id)
        self._formed = meeting, communicator

    def _enter(self, meeting: Meeting, deadline: Deadline) -> Communicator[Tensor]:
        deadline = deadline.capped(self._rendezvous.terms.form_s)
        watch = self._watch(meeting)
        communicator = self._backend.join(meeting, watch, deadline)
        try:
            while not self._rendezvous.joined(meeting):
                deadline.check("the others", f"joining over {self._backend.name}")
                time.sleep(NAP_S)
        except BaseException:
            communicator.abort()
            raise
        return communicator

    def _do(self, act: Callable[[Communicator[Tensor], Watch], None], awaited: int | None) -> None:
        """``awaited``: the rank without whom it cannot be done, blamed when the deadline comes first."""
        meeting, communicator = self._present()
        try:
            self._rendezvous.check(meeting)
            act(communicator, self._watch(meeting))
        except BadRequest:
            raise  # nothing was begun
        except BaseException as error:
            self._formed = None
            communicator.abort()
            if isinstance(error, EpochEnded):
                raise
            late = isinstance(error, DeadlineExceeded)
            blamed = [meeting.members[awaited]] if late and awaited is not None else []
            self._rendezvous.failed(meeting, f"{self._backend.name}: {error}", blamed)
            if isinstance(error, DeadlineExceeded) or not isinstance(error, FleetError):
                raise
            raise EpochEnded(f"epoch {meeting.epoch} of group {self._rendezvous.group} is over: {error}") from error

    def _watch(self, meeting: Meeting) -> Watch:
        return lambda: self._rendezvous.check(meeting)

    def _present(self) -> tuple[Meeting, Communicator[Tensor]]:
        if self._formed is None:
            raise EpochEnded(f"group {self._rendezvous.group} has not formed, or its epoch is over: form() it")
        return self._formed
