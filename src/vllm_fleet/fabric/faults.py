"""The script of a faulty transport: which faults happen to which transfers. Pure; fabric/transports/faulty.py acts.

What each fault means in terms of the contract (fabric/contract.py):

| fault | the transfer |
| --- | --- |
| Cut | moves its first bytes, then fails with TransferError |
| Delay | begins later; still correct, and cancel() ends the waiting |
| Reorder | moves its runs in another order and in several pieces; still correct |
| Truncate | leaves its last bytes unmoved and **claims success** |
| Corrupt | changes one byte that arrived and **claims success** |
| Refuse | (at connect) no link: LinkError with the reason |

Truncate and Corrupt break the contract on purpose: only a check of the content finds them. Everything else that the
inner transport promises still holds. The same script and the same order of calls give the same faults.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from vllm_fleet.config.connector import FabricFaults
from vllm_fleet.core.errors import BadRequest
from vllm_fleet.wire.names import FaultKind


@dataclass(frozen=True)
class Cut:
    """TransferError after this many bytes; a transfer that is not longer is not cut."""

    after_bytes: int


@dataclass(frozen=True)
class Delay:
    """Wait before the transfer, or before connecting."""

    seconds: float


@dataclass(frozen=True)
class Reorder:
    """Move the runs in an order drawn with this seed."""

    seed: int


@dataclass(frozen=True)
class Truncate:
    """Do not move the last ``nbytes``, and claim success."""

    nbytes: int


@dataclass(frozen=True)
class Corrupt:
    """Change one byte by exclusive or, and claim success.

    ``offset`` counts the transfer's bytes in the order of its plan, modulo their number. A read changes the byte that
    arrived in this side's pool; a write changes this side's byte while it is sent and puts it back.
    """

    offset: int
    xor: int = 0xFF


@dataclass(frozen=True)
class Refuse:
    """No link, for this reason."""

    reason: str


TransferFault: TypeAlias = Cut | Delay | Reorder | Truncate | Corrupt
ConnectFault: TypeAlias = Refuse | Delay


@dataclass(frozen=True)
class Rule:
    """Apply ``fault`` to the ``nth`` transfer (or connect) of the transport, counted from 0 in the order of the calls,
    and with ``every`` again after every so many; ``nth`` None: to each. All with this probability."""

    fault: TransferFault | ConnectFault
    nth: int | None = None
    probability: float = 1.0
    every: int = 0

    def applies(self, number: int, rng: random.Random) -> bool:
        """Whether it applies to this transfer or connect; draws from ``rng`` exactly once."""
        drawn = rng.random()
        return drawn < self.probability and (self.nth in (None, number) or self._again(number, self.nth or 0))

    def _again(self, number: int, first: int) -> bool:
        return self.every > 0 and number > first and (number - first) % self.every == 0


@dataclass(frozen=True)
class Script:
    """Which faults happen when. All rules that apply to a transfer apply together.

    Raises:
        BadRequest: a connect fault among those of transfers or the other way round, or an impossible number.
    """

    transfers: tuple[Rule, ...] = ()
    connects: tuple[Rule, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for rule in self.transfers:
            if isinstance(rule.fault, Refuse):
                raise BadRequest("Refuse is a fault of connects, not of transfers")
        for rule in self.connects:
            if not isinstance(rule.fault, Refuse | Delay):
                raise BadRequest(f"{type(rule.fault).__name__} is a fault of transfers; connects have Refuse and Delay")
        for rule in (*self.transfers, *self.connects):
            _check(rule)

    def faults(self, what: str, number: int) -> list[TransferFault | ConnectFault]:
        """Faults of transfer or connect ``number``; equal for equal seeds, whatever happened before."""
        rng = random.Random(f"{self.seed}/{what}/{number}")
        rules = self.transfers if what == "transfer" else self.connects
        return [rule.fault for rule in rules if rule.applies(number, rng)]


CUT_AT_BYTES = 4096
WRONG_BYTE = 12345


def rehearsal(faults: FabricFaults) -> Script:
    """What a fleet's ``fabric.faults`` asks for: the kinds take turns; ``refuse`` counts connections, not transfers."""
    made: dict[FaultKind, TransferFault | ConnectFault] = {
        "cut": Cut(CUT_AT_BYTES),
        "delay": Delay(faults.delay_s),
        "reorder": Reorder(faults.seed),
        "refuse": Refuse("fabric.faults asks for it"),
        "truncate": Truncate(1),
        "corrupt": Corrupt(WRONG_BYTE),
    }
    transfers = [made[kind] for kind in faults.kinds if kind != "refuse"]
    connects = [made["refuse"]] if "refuse" in faults.kinds else []
    return Script(_rules(transfers, faults), _rules(connects, faults), faults.seed)


def _rules(made: Sequence[TransferFault | ConnectFault], faults: FabricFaults) -> tuple[Rule, ...]:
    drawn = [Rule(fault, probability=faults.rate / len(made)) for fault in made if faults.rate]
    turns = [
        Rule(fault, nth=(at + 1) * faults.every - 1, every=len(made) * faults.every)
        for at, fault in enumerate(made)
        if faults.every
    ]
    return (*drawn, *turns)


def _check(rule: Rule) -> None:
    fault = rule.fault
    if not 0 <= rule.probability <= 1 or (rule.nth or 0) < 0 or rule.every < 0:
        raise BadRequest(f"{rule}: a probability is from 0 to 1, nth counts from 0, and every is not negative")
    amounts = {Cut: "after_bytes", Delay: "seconds", Truncate: "nbytes", Corrupt: "offset"}
    if type(fault) in amounts and getattr(fault, amounts[type(fault)]) < 0:
        raise BadRequest(f"{fault}: {amounts[type(fault)]} must not be negative")
    if isinstance(fault, Corrupt) and not 1 <= fault.xor <= 255:
        raise BadRequest(f"{fault}: xor must be from 1 to 255, or nothing is changed")
