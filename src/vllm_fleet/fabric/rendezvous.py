"""How workers that want to communicate as a group obtain its id: a seam, on whose other side the controller may stand.

Knows nothing of the library whose id it carries: bytes of bounded length, made by one member and given to the others.
Two implementations: ChannelRendezvous, for a pair that has a connection of its own anyway (a link of the nccl
transport), needs no controller; ControllerRendezvous (groups/controlled.py) is for any number of workers that know only
each other's names, and learns when one of them dies.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import Corrupt, LinkError
from vllm_fleet.fabric.endpoint import receive_answer
from vllm_fleet.net.channel import Channel
from vllm_fleet.wire import fabric as wire


@dataclass(frozen=True)
class Meeting:
    """One member's place in one group. A group never changes: when a member is lost, the next epoch has another id."""

    rank: int
    """Ours, from 0; the member of rank 0 made the id."""
    ranks: int
    epoch: int
    group_id: bytes
    """Opaque, at most limits.NCCL_ID_BYTES_MAX bytes; the same for all members."""
    members: tuple[str, ...] = ()
    """Names by rank, where members have names."""


class EpochEnded(LinkError):
    """The group's epoch is over: a member died, failed, left or joined. Abort, and meet for the next one."""


class Rendezvous(Protocol):
    """Brings workers together; each object serves one worker's side of one group."""

    def meet(self, create: Callable[[], bytes], deadline: Deadline) -> Meeting:
        """The next epoch of the group; ``create`` makes its id if this worker has rank 0.

        Returns when the others can learn the id, which may be before they have joined.

        Raises:
            LinkError: the group cannot be had.
            DeadlineExceeded: the others did not come in time.
        """
        ...

    def joined(self, meeting: Meeting) -> bool:
        """Whether all others have said that they are in; does not wait.

        Raises:
            LinkError: one of them refused, or the meeting is over.
        """
        ...


class ChannelRendezvous:
    """Two workers, one connection: the asker makes the id and tells it to the peer's endpoint. For one thread.

    ``invite(epoch, group id)`` makes the question. ``channel`` is replaced when the connection is made again; epochs go
    on counting.
    """

    def __init__(self, invite: Callable[[int, bytes], wire.NcclJoin]) -> None:
        self.channel: Channel | None = None
        self._invite = invite
        self._epochs = itertools.count(1)

    def meet(self, create: Callable[[], bytes], deadline: Deadline) -> Meeting:
        """Returns when the peer has agreed to come: joining waits for one that does not, maybe for ever."""
        channel = self._connected()
        meeting = Meeting(0, 2, next(self._epochs), create())
        channel.send(wire.encode(self._invite(meeting.epoch, meeting.group_id)), deadline)
        self._expect(channel, meeting, deadline)
        return meeting

    def joined(self, meeting: Meeting) -> bool:
        channel = self._connected()
        if not channel.has_arrived():
            return False
        self._expect(channel, meeting, Deadline.after(ANSWER_S, "fabric.rendezvous.ANSWER_S"))
        return True

    @staticmethod
    def _expect(channel: Channel, meeting: Meeting, deadline: Deadline) -> None:
        answer = receive_answer(channel, deadline)
        if isinstance(answer, wire.Denied):
            raise LinkError(f"{channel.peer} refused to join: {answer.reason} {answer.detail}".rstrip())
        if answer != wire.NcclJoined(meeting.epoch):
            raise Corrupt(f"{channel.peer} answered a join with {type(answer).__name__}")

    def _connected(self) -> Channel:
        if self.channel is None:
            raise LinkError("no connection to the peer")
        return self.channel


ANSWER_S = 5.0
"""The rest of an answer must follow its first byte within this time."""
