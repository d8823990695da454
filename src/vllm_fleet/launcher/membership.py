"""Decides when an instance that cannot register itself is registered, says that it lives, and leaves. Pure.

With one of vLLM's own connectors nothing of ours runs inside the instance, so the supervisor, which started the
process, speaks for it. A Life is one start of one instance. ``due`` says what to do now, at most one question to the
instance and one call to the controller at a time; whoever does it reports with the ``on_`` methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vllm_fleet.wire.control import Heartbeat, Register, Registered, ReportedState
from vllm_fleet.wire.names import Role

ASK_EVERY_S = 0.25  # /health of an instance that loads
ASK_SERVING_S = 2.0  # ... of one that serves: vLLM's server logs a line for each
RETRY_S = 0.5  # after a call to the controller that failed
SILENCE_S = 5.0  # /health that has not answered 200 for so long: nobody says any more that the instance lives


@dataclass(frozen=True)
class Ask:
    """Ask the instance's /health; on_health follows."""


@dataclass(frozen=True)
class Join:
    """Register; on_joined or on_failed follows."""

    request: Register


@dataclass(frozen=True)
class Beat:
    """Send a heartbeat; on_beat or on_failed follows."""

    name: str
    beat: Heartbeat


@dataclass(frozen=True)
class Leave:
    """Deregister; on_left follows, whether it worked or not: the lease ends it otherwise."""

    name: str
    generation: int


Act = Ask | Join | Beat | Leave


@dataclass
class Life:
    """One start of one instance, as the supervisor tells it to the controller."""

    name: str
    role: Role
    url: str
    pid: int
    incarnation: str
    """Another after each start."""
    fingerprint: Mapping[str, str]
    over: bool = False
    """Nothing is left to do."""
    serving: bool = False
    """Its /health answered 200 once."""
    _ended: bool = False
    _joined: Registered | None = None
    _healthy_at: float = float("-inf")
    _asking: bool = field(default=False, repr=False)
    _calling: bool = field(default=False, repr=False)
    _ask_at: float = 0.0
    _call_at: float = 0.0

    def due(self, now: float) -> list[Act]:
        """What to do now."""
        if self._ended:
            return self._leave()
        acts: list[Act] = []
        if not self._asking and now >= self._ask_at:
            self._asking = True
            acts.append(Ask())
        if not self._calling and now >= self._call_at and self._lives(now):
            self._calling = True
            acts.append(self._call())
        return acts

    def end(self) -> None:
        """The process is told to stop, or is dead. Safe to call twice."""
        self._ended = True

    def on_health(self, healthy: bool, now: float) -> None:
        """The answer to Ask."""
        self._asking = False
        if healthy:
            self._healthy_at = now
            if not self.serving:
                self.serving, self._call_at = True, now  # requests may come: say so at once
        self._ask_at = now + (ASK_SERVING_S if healthy else ASK_EVERY_S)

    def on_joined(self, answer: Registered, now: float) -> None:
        """Join worked."""
        self._joined = answer
        self.on_beat(None, now)

    def on_beat(self, told_s: float | None, now: float) -> None:
        """The controller knows that it lives. ``told_s``: how long to wait now; None: as it said at first."""
        self._calling = False
        assert self._joined is not None, "a heartbeat of nobody"
        self._call_at = now + (self._joined.heartbeat_s if told_s is None else told_s)

    def on_failed(self, now: float, *, unknown: bool) -> None:
        """Join or Beat failed. ``unknown``: the controller does not know this life, or not as we told it."""
        self._calling = False
        self._call_at = now + RETRY_S
        if unknown:
            self._joined = None

    def on_left(self) -> None:
        """Leave was tried."""
        self._calling, self.over = False, True

    def _lives(self, now: float) -> bool:
        return not self.serving or now - self._healthy_at <= SILENCE_S

    def _call(self) -> Act:
        state: ReportedState = "ready" if self.serving else "starting"
        if self._joined is not None:
            return Beat(self.name, Heartbeat(self._joined.generation, state))
        said = dict(self.fingerprint)
        return Join(Register(self.name, self.role, self.url, self.pid, self.incarnation, state, said))

    def _leave(self) -> list[Act]:
        if self._calling or self.over:  # a Join under way may still register it
            return []
        if self._joined is None:
            self.over = True
            return []
        self._calling = True
        return [Leave(self.name, self._joined.generation)]
