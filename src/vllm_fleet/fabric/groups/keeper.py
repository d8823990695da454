"""Being in an epoch, as the controller sees it: a thread that says so and hears when the epoch has formed or ended."""

from __future__ import annotations

import threading
from typing import Protocol

from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import BadRequest, Busy, Corrupt, PeerGone
from vllm_fleet.wire.groups import Hold, Progress

HOLD_S = 1.0
"""One question waits so long at the controller: a controller that was restarted hears of the epoch within this time."""
PAUSE_S_MIN, PAUSE_S_MAX = 0.05, 0.5
"""Between two questions to a controller that does not answer; doubles."""


class Holding(Protocol):
    """What a Keeper needs of the client."""

    def within(self, wait_s: float, setting: str) -> Deadline: ...

    def hold(self, group: str, message: Hold, deadline: Deadline) -> Progress: ...


class Keeper:
    """Keeps one epoch until it has ended or ``stop`` is called. A controller that is away ends nothing."""

    def __init__(self, client: Holding, group: str, hold: Hold) -> None:
        self.formed = False
        self.ended: str | None = None
        """Why the epoch is over; None: it is not."""
        self._client, self._group, self._hold = client, group, hold
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fleet-group-keeper", daemon=True)
        self._thread.start()

    def note(self, progress: Progress) -> None:
        """What the controller says of the epoch, whoever heard it."""
        if progress.state == "formed":
            self.formed = True
        elif progress.state == "ended":
            self.end(progress.reason or "it ended")

    def end(self, reason: str) -> None:
        """The epoch is over."""
        if self.ended is None:
            self.ended = reason

    def stop(self) -> None:
        """Say no more. The thread ends when the controller has answered, which may take HOLD_S."""
        self._stopped.set()

    def wait(self, seconds: float) -> bool:
        """Whether the thread has ended within this time."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        pause_s = PAUSE_S_MIN
        while not self._stopped.is_set() and self.ended is None:
            known = self._hold
            message = Hold(
                known.who, known.terms, known.epoch, known.ranks, "formed" if self.formed else "open", HOLD_S
            )
            deadline = self._client.within(HOLD_S, "fabric.groups.keeper.HOLD_S")
            try:
                self.note(self._client.hold(self._group, message, deadline))
                pause_s = PAUSE_S_MIN
            except BadRequest as error:  # Fenced: not the present epoch, or not our life
                self.end(str(error))
            except (PeerGone, Busy, Corrupt):
                self._stopped.wait(pause_s)
                pause_s = min(2 * pause_s, PAUSE_S_MAX)
