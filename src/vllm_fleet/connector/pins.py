"""The blocks one prefill worker holds for decode workers: a pure table of pins, with time passed in.

A pin is ``held`` until its decode worker comes, ``open`` while that worker reads, and ends when it is closed, when its
opener's connection is lost, or when its lease is over. A transfer is single-use: once ended it is unknown.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_fleet.core import limits
from vllm_fleet.fabric.plan import Ints


@dataclass
class Pin:
    """One request's blocks, held for one transfer."""

    request: str
    blocks: tuple[int, ...]
    deadline: float
    opener: Hashable | None = None


@dataclass
class PinTable:
    """All pins of one worker. Not locked: the caller is."""

    hold_s: float
    pins: dict[str, Pin] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)
    """Requests whose blocks the engine may free, in the order their pins ended; the caller takes and clears it."""
    expired: int = 0
    """Pins that ended because nobody came, or nobody finished, in time."""

    def hold(self, transfer: str, request: str, blocks: Sequence[int], deadline: float) -> None:
        """Hold blocks until ``deadline``; when the table is full they are given back at once."""
        if len(self.pins) >= limits.PINS_MAX:
            self.ended.append(request)
            return
        assert transfer not in self.pins, f"transfer {transfer} is held already"
        self.pins[transfer] = Pin(request, tuple(blocks), deadline)

    def open(self, transfer: str, opener: Hashable, now: float) -> Pin | None:
        """The pin, now open for ``opener``; None when it is unknown or open for somebody else."""
        self.expire(now)
        pin = self.pins.get(transfer)
        if pin is None or (pin.opener is not None and pin.opener != opener):
            return None
        pin.opener = opener
        pin.deadline = now + self.hold_s
        return pin

    def close(self, transfer: str, opener: Hashable, now: float) -> bool:
        """End a pin; whether its blocks were held until now. Closing a pin that nobody opened gives it up."""
        self.expire(now)
        pin = self.pins.get(transfer)
        if pin is None or (pin.opener is not None and pin.opener != opener):
            return False
        self._end(transfer)
        return True

    def lost(self, opener: Hashable) -> None:
        """The opener's connection ended: so do the pins it had open."""
        for transfer in [t for t, pin in self.pins.items() if pin.opener == opener]:
            self._end(transfer)

    def expire(self, now: float) -> list[str]:
        """End the pins whose deadline has come; their transfers."""
        late = [transfer for transfer, pin in self.pins.items() if pin.deadline <= now]
        for transfer in late:
            self._end(transfer)
        self.expired += len(late)
        return late

    def covers(self, transfer: str, first: Ints, last: Ints) -> bool:
        """Whether an open pin holds all blocks from ``first[i]`` to ``last[i]``, for every i."""
        pin = self.pins.get(transfer)
        if pin is None or pin.opener is None:
            return False
        held = np.unique(np.array(pin.blocks, np.int64))
        inside = np.searchsorted(held, last, side="right") - np.searchsorted(held, first, side="left")
        return bool((inside == last - first + 1).all())

    def _end(self, transfer: str) -> None:
        self.ended.append(self.pins.pop(transfer).request)
