"""A blocking client of the controller's calls about groups, for workers' threads: each call has a deadline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar
from urllib.parse import quote

from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import Corrupt
from vllm_fleet.net.control_client import ControlClient
from vllm_fleet.wire import groups as wire
from vllm_fleet.wire.names import DECODE_ERRORS

Message = TypeVar("Message")

ANSWER_S = 2.0
"""One controller's answer must come so long after the time that it was asked to wait, or its silence counts."""


class GroupsClient(ControlClient):
    """The calls of wire/groups.py. They raise what ControlClient does; Fenced (409) when an epoch is not the present
    one or this life of the member cannot come back.
    """

    def __init__(self, url: str | Sequence[str], bearer: str) -> None:
        super().__init__(url, bearer)
        self._controllers = len({url} if isinstance(url, str) else set(url))

    def within(self, wait_s: float, setting: str) -> Deadline:
        """A deadline in which a call that waits for ``wait_s`` can be answered, by whichever controller leads."""
        return Deadline.after(self._controllers * (wait_s + ANSWER_S), setting)

    def meet(self, group: str, message: wire.Meet, deadline: Deadline) -> wire.MeetAnswer:
        """Be here for the next epoch; waits for ``message.wait_s`` at most."""
        return _decoded(wire.decode_meet_answer, self._post(group, "meet", wire.encode(message), deadline))

    def give_id(self, group: str, message: wire.GiveId, deadline: Deadline) -> wire.Come:
        """As rank 0, hand in the id."""
        return _decoded(wire.decode_come, self._post(group, "id", wire.encode(message), deadline))

    def joined(self, group: str, message: wire.Joined, deadline: Deadline) -> wire.Progress:
        """Say that this member's communicator stands."""
        return _decoded(wire.decode_progress, self._post(group, "joined", wire.encode(message), deadline))

    def hold(self, group: str, message: wire.Hold, deadline: Deadline) -> wire.Progress:
        """Be in an epoch; waits for ``message.wait_s`` at most."""
        return _decoded(wire.decode_progress, self._post(group, "hold", wire.encode(message), deadline))

    def failed(self, group: str, message: wire.Failed, deadline: Deadline) -> None:
        """Say that this member's communicator failed."""
        self._post(group, "failed", wire.encode(message), deadline)

    def leave(self, group: str, message: wire.Leave, deadline: Deadline) -> None:
        """Go for good."""
        self._post(group, "leave", wire.encode(message), deadline)

    def status(self, group: str, deadline: Deadline) -> wire.GroupStatus:
        """How a group stands; NotRegistered when there is none of that name."""
        answer = self._call("GET", f"/v1/groups/{quote(group, safe='')}", None, deadline)
        return _decoded(wire.decode_status, answer)

    def list(self, deadline: Deadline) -> wire.GroupList:
        """All groups."""
        return _decoded(wire.decode_list, self._call("GET", "/v1/groups", None, deadline))

    def _post(self, group: str, what: str, body: bytes, deadline: Deadline) -> bytes:
        return self._call("POST", f"/v1/groups/{quote(group, safe='')}/{what}", body, deadline)


def _decoded(decode: Callable[[bytes], Message], answer: bytes) -> Message:
    try:
        return decode(answer)
    except DECODE_ERRORS as error:
        raise Corrupt(f"the controller's answer is not what it must be: {error}") from error
