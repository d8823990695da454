"""Meeting through the controller: any number of workers that know each other's names and nothing else."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import time
from collections.abc import Callable, Sequence

from vllm_fleet.core import limits
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import (
    BadRequest,
    Busy,
    Corrupt,
    DeadlineExceeded,
    Fenced,
    FleetError,
    NotRegistered,
    PeerGone,
)
from vllm_fleet.fabric.groups.keeper import PAUSE_S_MAX, PAUSE_S_MIN, Keeper
from vllm_fleet.fabric.rendezvous import EpochEnded, Meeting
from vllm_fleet.net.groups_client import GroupsClient
from vllm_fleet.wire.groups import (
    Attendee,
    Come,
    Create,
    EpochId,
    Failed,
    GiveId,
    Hold,
    Joined,
    Leave,
    Meet,
    Terms,
    Waiting,
)

MEET_S = 5.0
"""One question waits so long at the controller for others to come."""
CALL_S = 2.0
"""Any other call."""
SETTING = "fabric.groups.controlled.CALL_S"


def pair_name(one: str, other: str) -> str:
    """The group of two workers, whichever asks."""
    both = "\n".join(sorted((one, other)))
    return f"pair-{hashlib.sha256(both.encode()).hexdigest()[:40]}"


def pair(client: GroupsClient, who: Attendee, other: str, form_s: float = 10.0) -> ControllerRendezvous:
    """Meet one other worker, of whom only the name is known."""
    terms = Terms((who.name, other), least=2, form_s=form_s)
    return ControllerRendezvous(client, pair_name(who.name, other), who, terms)


def group(
    client: GroupsClient, name: str, who: Attendee, members: Sequence[str], least: int = 2, gather_s: float = 2.0
) -> ControllerRendezvous:
    """Meet as a group. An epoch needs ``least`` members; it waits for others until ``gather_s`` after the last one.

    With ``least=len(members)`` nothing is done without all of them.
    """
    return ControllerRendezvous(client, name, who, Terms(tuple(members), least=least, gather_s=gather_s))


def attendee(name: str, instance: str = "", generation: int = 0) -> Attendee:
    """A new life of a worker; of an instance that is registered with the controller, if it is named."""
    return Attendee(name, secrets.token_hex(16), instance, generation)


class ControllerRendezvous:
    """A Rendezvous over the controller's groups API. For one thread, but for ``check``; close it in the end.

    Between ``meet`` and the end of the epoch a thread of its own says that this worker lives: whoever holds the
    interpreter's lock for more than GROUP_LEASE_S is taken for dead. While the controller is away, epochs go on.
    """

    def __init__(self, client: GroupsClient, group: str, who: Attendee, terms: Terms) -> None:
        self.group, self.who, self.terms = group, who, terms
        self._client = client
        self._after = 0
        self._epoch: EpochId | None = None
        self._keeper: Keeper | None = None
        self._said_at = 0.0
        self._said = False

    def meet(self, create: Callable[[], bytes], deadline: Deadline) -> Meeting:
        """See Rendezvous.meet. Gives up the epoch before, if there is one.

        Raises:
            Fenced: this life has left, or a later one has come.
            DeadlineExceeded: names who did not come.
        """
        self._stop()
        missing, trouble = "the controller", ""
        pause_s = PAUSE_S_MIN
        while True:
            self._check(deadline, missing, trouble)
            try:
                answer = self._ask_to_meet(deadline)
            except (PeerGone, Busy, Corrupt, NotRegistered) as error:
                missing, trouble = "the controller", f": {error}"
                time.sleep(min(pause_s, deadline.remaining()))
                pause_s = min(2 * pause_s, PAUSE_S_MAX)
                continue
            pause_s = PAUSE_S_MIN
            if isinstance(answer, Create):
                self._begin(answer)
                answer = self._give_id(answer, create, deadline)
            if isinstance(answer, Come):
                self._begin(answer)
                rank = answer.ranks.index(self.who.name)
                return Meeting(rank, len(answer.ranks), answer.epoch.number, answer.group_id, answer.ranks)
            if isinstance(answer, Waiting):
                missing = ", ".join(answer.missing) or "the others"
                trouble = f" (the last epoch ended: {answer.ended})" if answer.ended else ""

    def joined(self, meeting: Meeting) -> bool:
        """See Rendezvous.joined. The first call says that this worker is in, which may take CALL_S."""
        self.check(meeting)
        keeper = self._present()
        if not self._said and time.monotonic() >= self._said_at:
            assert self._epoch is not None
            self._said_at = time.monotonic() + PAUSE_S_MAX
            try:
                deadline = self._client.within(0.0, SETTING)
                keeper.note(self._client.joined(self.group, Joined(self.who, self._epoch), deadline))
                self._said = True
            except BadRequest as error:
                keeper.end(str(error))
            except (PeerGone, Busy, Corrupt):
                pass  # said again, until the caller's deadline
            self.check(meeting)
        return keeper.formed

    def check(self, meeting: Meeting) -> None:
        """Raise EpochEnded when the epoch is over, as far as this worker has heard."""
        keeper = self._keeper
        if keeper is None or self._epoch is None or self._epoch.number != meeting.epoch:
            raise EpochEnded(f"epoch {meeting.epoch} of group {self.group} was given up")
        if keeper.ended is not None:
            raise EpochEnded(f"epoch {meeting.epoch} of group {self.group} is over: {keeper.ended}")

    def failed(self, meeting: Meeting, reason: str, blamed: Sequence[str] = ()) -> None:
        """Say that the communicator failed, so that the others learn it now. Raises nothing: what cannot be said now is
        understood when this worker meets again.
        """
        if self._epoch is None or self._epoch.number != meeting.epoch:
            return
        epoch = self._epoch
        self._stop()
        message = Failed(self.who, epoch, reason[: limits.GROUP_REASON_LEN_MAX], tuple(blamed))
        with contextlib.suppress(FleetError):
            self._client.failed(self.group, message, self._client.within(0.0, SETTING))

    def close(self) -> None:
        """Leave the group for good."""
        keeper = self._keeper
        self._stop()
        with contextlib.suppress(FleetError):
            self._client.leave(self.group, Leave(self.who), self._client.within(0.0, SETTING))
        if keeper is not None:
            keeper.wait(CALL_S)

    def _ask_to_meet(self, deadline: Deadline) -> Waiting | Create | Come | None:
        wait_s = min(MEET_S, 0.8 * deadline.remaining())
        message = Meet(self.who, self.terms, self._after, wait_s)
        within = self._client.within(wait_s, SETTING)
        try:
            return self._client.meet(self.group, message, within if within.at < deadline.at else deadline)
        except DeadlineExceeded:
            if deadline.expired():
                return None  # the caller's error says who is missing
            raise

    def _give_id(self, answer: Create, create: Callable[[], bytes], deadline: Deadline) -> Come | None:
        """Make the id and hand it in; None when the epoch is over already."""
        try:
            group_id = create()
        except FleetError as error:
            self.failed(Meeting(0, len(answer.ranks), answer.epoch.number, b""), f"making the id: {error}")
            raise
        pause_s = PAUSE_S_MIN
        while True:
            within = self._client.within(0.0, SETTING)
            within = within if within.at < deadline.at else deadline
            try:
                return self._client.give_id(self.group, GiveId(self.who, answer.epoch, group_id), within)
            except Fenced:
                self._after = max(self._after, answer.epoch.number)
                return None
            except (PeerGone, Busy):
                if deadline.expired():
                    raise
                time.sleep(min(pause_s, deadline.remaining()))
                pause_s = min(2 * pause_s, PAUSE_S_MAX)

    def _check(self, deadline: Deadline, missing: str, trouble: str) -> None:
        if deadline.expired():
            raise deadline.error(missing, f"meeting for group {self.group}{trouble}")

    def _begin(self, answer: Create | Come) -> None:
        if self._keeper is not None and self._epoch == answer.epoch:
            return
        self._stop()
        self._epoch, self._said, self._said_at = answer.epoch, False, 0.0
        self._after = max(self._after, answer.epoch.number - 1)
        hold = Hold(self.who, self.terms, answer.epoch, answer.ranks)
        self._keeper = Keeper(self._client, self.group, hold)

    def _stop(self) -> None:
        """Have done with the epoch."""
        if self._keeper is not None:
            self._keeper.stop()
        if self._epoch is not None:
            self._after = max(self._after, self._epoch.number)
        self._keeper = self._epoch = None

    def _present(self) -> Keeper:
        assert self._keeper is not None
        return self._keeper
