"""The error tree, grouped by what the caller can do about it.

FleetError
├── BadRequest        the caller's fault: correct the request and try again
│   ├── ConfigError   a setting is wrong: names the setting, what was expected and what was found
│   ├── Fenced        a later life holds this name: stop acting for it, or come back as a new life
│   └── NotRegistered the controller does not know this name: register again
├── Busy              nobody's fault: try again later
│   └── NotLeader     another controller leads: ask that one
├── PeerGone          the other side is dead or unreachable: try elsewhere
│   ├── DeadlineExceeded   it did not answer in time: names who, what and which setting to look at
│   └── LinkError          no link of this transport to this peer: says why
├── Corrupt           what arrived must not be used: never retry with this copy
│   └── AuthError     the peer did not prove the fleet's token
└── Bug               ours: report it
"""

from __future__ import annotations


class FleetError(Exception):
    """Base of every error this package raises on purpose."""


class BadRequest(FleetError):
    """The caller's fault: correct the request and try again."""


class ConfigError(BadRequest):
    """A setting is wrong; the message names it, what was expected and what was found."""


class Fenced(BadRequest):
    """A later life of this member holds its name; this one must stop acting for it, or come back as a new life."""


class NotRegistered(BadRequest):
    """The controller does not know this member (its lease ended, or the journal is new): register again."""


class Busy(FleetError):
    """A limit is reached; the same call may succeed later."""


class NotLeader(Busy):
    """This controller does not lead its fleet, or not any more. ``leader``: the URL of the one that does, as it said
    itself; empty when nobody is known to. Believe it only where it is one of your own settings: it gets your token.
    """

    def __init__(self, message: str, leader: str = "") -> None:
        super().__init__(message)
        self.leader = leader


class PeerGone(FleetError):
    """The other side is dead or unreachable; another peer may answer."""


class DeadlineExceeded(PeerGone):
    """The other side did not answer in time."""

    def __init__(self, who: str, what: str, waited_s: float, setting: str) -> None:
        super().__init__(f"{who} did not finish {what} within {waited_s:.3g} s (setting: {setting})")
        self.who, self.what, self.waited_s, self.setting = who, what, waited_s, setting


class LinkError(PeerGone):
    """A transport cannot reach this peer; the message says why."""


class Corrupt(FleetError):
    """Received bytes are not what they claim to be; never use this copy."""


class AuthError(Corrupt):
    """The peer did not prove that it holds the fleet's token. Carries no detail on purpose."""


class Bug(FleetError):
    """An invariant of ours is broken."""
