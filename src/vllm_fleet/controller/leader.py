"""Who leads: of several controllers on one etcd, the one whose key is there, for as long as its lease lives.

A leader trusts its own clock less than etcd does: it takes its lease for ended a little before etcd can end it, counted
from before it asked for the renewal. So whatever pauses a process, it answers nothing as leader that another one may
contradict; and what it still sends to etcd is refused there (stores/etcd.py).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

from vllm_fleet.core import limits, log
from vllm_fleet.core.env import Env
from vllm_fleet.core.errors import Busy, Corrupt, NotLeader

CAUTION = 0.9  # of a lease: clocks run differently fast, and an answer takes a moment to be sent
RENEWALS = 3  # per lease


@dataclass(frozen=True)
class Term:
    """One time of leading. Its number is the revision at which etcd made the key, which grows from term to term."""

    key: bytes
    revision: int
    lease: int
    ttl_s: float


@dataclass(frozen=True)
class Following:
    """Somebody else leads. ``seen``: the revision of its key."""

    leader: str
    seen: int


class Election(Protocol):
    """How an etcd is asked. Calls block, each with a deadline of its own, and never overlap; they raise Busy or Corrupt
    when etcd does not answer.
    """

    def campaign(self) -> Term | Following:
        """Lead, if nobody does."""
        ...

    def renew(self, term: Term) -> float | None:
        """For how many seconds from the moment of asking the lease is good; None: the term has ended."""
        ...

    def wait(self, seen: Following) -> None:
        """Return when it may not lead any more, at the latest after a second."""
        ...

    def resign(self, term: Term) -> None:
        """End the term at once, so that nobody waits for its lease."""
        ...


class Leadership:
    """This controller's part in it. One task uses ``gain`` and ``keep`` in turn; anybody may ask ``holds``."""

    def __init__(self, election: Election, env: Env) -> None:
        self.leader = ""
        """URL of the controller that leads, when it is another one and known."""
        self.reachable = True
        """Whether etcd answered when it was last asked."""
        self._election, self._env = election, env
        self._term: Term | None = None
        self._ends_at = float("-inf")
        self._paused = False

    def holds(self) -> bool:
        """Whether this controller certainly leads now."""
        return self._env.now() < self._ends_at

    def refusal(self) -> NotLeader:
        """What to answer while it does not."""
        if self._term is not None:
            return NotLeader("this controller's lease was not renewed in time: etcd must say whether it still leads")
        where = f"; {self.leader} does" if self.leader else ", and who does is not known"
        return NotLeader(f"this controller does not lead the fleet{where}", self.leader)

    async def gain(self) -> Term:
        """Stand by until this controller leads."""
        while True:
            asked = self._env.now()
            try:
                outcome = await asyncio.to_thread(self._election.campaign)
            except (Busy, Corrupt) as error:
                self._failed(error)
                await asyncio.sleep(limits.ETCD_RETRY_S)
                continue
            self.reachable = True
            if isinstance(outcome, Term):
                self._term, self.leader = outcome, ""
                self._granted(asked, outcome.ttl_s)
                log.event("leader.gained", term=outcome.revision)
                return outcome
            self.leader = outcome.leader
            await asyncio.to_thread(self._election.wait, outcome)

    async def keep(self, term: Term) -> None:
        """Renew the lease; returns when the term has ended. While etcd does not answer, nobody can say that it has: the
        term is paused by ``holds`` and goes on when etcd says that nobody took over.
        """
        pause_s = term.ttl_s / RENEWALS
        while True:
            await asyncio.sleep(pause_s)
            if not self.holds() and not self._paused:
                self._paused = True
                log.warn("leader.paused", term=term.revision)
            asked = self._env.now()
            try:
                ttl_s = await asyncio.to_thread(self._election.renew, term)
            except (Busy, Corrupt) as error:
                self._failed(error)
                pause_s = limits.ETCD_RETRY_S
                continue
            self.reachable = True
            if ttl_s is None:
                self.lose(term)
                return
            self._granted(asked, ttl_s)
            pause_s = ttl_s / RENEWALS
            if self._paused and self.holds():
                self._paused = False
                log.event("leader.resumed", term=term.revision)

    def lose(self, term: Term) -> None:
        """The term has ended."""
        if self._term is term:
            self._forget()
            log.warn("leader.lost", term=term.revision)

    async def resign(self, term: Term) -> None:
        """Let another one lead, at once if etcd answers. Answers nothing as leader from now on. After ``lose`` too."""
        self._forget()
        try:
            await asyncio.to_thread(self._election.resign, term)
        except (Busy, Corrupt) as error:
            self._failed(error)

    def _forget(self) -> None:
        self._term, self._ends_at, self._paused = None, float("-inf"), False

    def _granted(self, asked: float, ttl_s: float) -> None:
        self._ends_at = asked + CAUTION * ttl_s

    def _failed(self, error: Exception) -> None:
        if self.reachable:
            log.warn("leader.unsure", reason=str(error))
        self.reachable = False
