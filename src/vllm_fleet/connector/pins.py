"""The blocks one prefill worker holds for decode workers: a pure table of pins, with time passed in.

    expected ──blocks come──> growing ──request finished──> held ──last reader closed, lost or lease over──> ended
       (a reader was first)      └──preempted, aborted──> revoked

While a pin grows its request is still computed, and the engine frees nothing; readers take what is ready. Its blocks
are the engine's to free from the moment it is told that the pin ended, which it only can be told of a finished request:
a pin whose readers are done before that is ``over`` and ends when its request finishes. A transfer is single-use: once
its pin has ended or was revoked it is unknown.
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

    request: str = ""
    prompt: bytes = b""
    """Digest of the prompt that the KV is of."""
    wanted: bytes = b""
    """Digest of the prompt that readers want the KV of."""
    blocks: list[int] = field(default_factory=list)
    ready: int = 0
    """Tokens whose KV is in the blocks."""
    known: bool = False
    """Whether its request has begun; else a reader came first."""
    held: bool = False
    over: bool = False
    """Nobody reads it any more."""
    deadline: float | None = None
    readers: int = 0
    """Decode workers that read it, told by the first of them; 0: none has come."""
    open: dict[int, Hashable] = field(default_factory=dict)
    """Who reads now: the reader's number, and its connection."""
    closed: set[int] = field(default_factory=set)


@dataclass
class PinTable:
    """All pins of one worker. Not locked: the caller is."""

    hold_s: float
    lease_s: float
    pins: dict[str, Pin] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)
    """Requests whose blocks the engine may free, in the order their pins ended; the caller takes and clears it."""
    changed: set[str] = field(default_factory=set)
    """Transfers that readers should hear of; the caller takes and clears it."""
    refused: set[str] = field(default_factory=set)
    """Transfers whose readers want another prompt's KV; the caller tells them and clears it."""
    past: dict[str, None] = field(default_factory=dict)
    """Transfers that ended, the oldest first."""
    expired: int = 0
    """Pins that ended because nobody came, or nobody finished, in time."""

    # What the engine says ----------------------------------------------------------------------------------------

    def grow(self, transfer: str, request: str, prompt: bytes, blocks: Sequence[int]) -> None:
        """A running request has these further blocks."""
        pin = self.pins.get(transfer)
        if pin is None:
            if transfer in self.past or len(self.pins) >= limits.PINS_MAX:
                self._forget(transfer)  # for good: further blocks without these would pass for the prompt's first
                return
            pin = self.pins[transfer] = Pin()
        if not pin.known:
            pin.deadline = None
            self._learn(transfer, pin, request, prompt)
        pin.blocks.extend(blocks)

    def publish(self, transfer: str, ready: int) -> None:
        """The KV of this many tokens is in the blocks now."""
        pin = self.pins.get(transfer)
        if pin is not None and ready > pin.ready:
            pin.ready = ready
            self.changed.add(transfer)

    def hold(self, transfer: str, request: str, prompt: bytes, blocks: Sequence[int], tokens: int, now: float) -> None:
        """The request has finished: its blocks stay until the pin ends; at once where nobody wants them any more."""
        pin = self.pins.get(transfer)
        if pin is None:
            if len(self.pins) >= limits.PINS_MAX:
                self.ended.append(request)
                self._forget(transfer)
                return
            pin = self.pins[transfer] = Pin()
        self._learn(transfer, pin, request, prompt)
        pin.blocks, pin.ready, pin.held = list(blocks), tokens, True
        pin.deadline = now + (self.hold_s if pin.open else self.lease_s)
        self.changed.add(transfer)
        if pin.over:
            self._end(transfer)

    def revoke(self, transfer: str) -> None:
        """The running request has lost its blocks: whoever reads them must throw away what it has."""
        self.pins.pop(transfer, None)
        self._forget(transfer)  # though it may not have begun: nobody is to wait for it

    # What readers say --------------------------------------------------------------------------------------------

    def open(
        self,
        transfer: str,
        opener: Hashable,
        now: float,
        *,
        prompt: bytes,
        reader: int = 0,
        readers: int = 1,
        wait: bool = False,
    ) -> Pin | None:
        """The pin, now open for ``reader``; None when it is unknown, over, of another prompt, or open for another.

        Args:
            prompt: digest of what the reader wants the KV of.
            wait: an unknown transfer is expected to begin within the lease.
        """
        self.expire(now)
        pin = self.pins.get(transfer)
        if pin is None:
            if not wait or transfer in self.past or len(self.pins) >= limits.PINS_MAX:
                return None
            pin = self.pins[transfer] = Pin(deadline=now + self.hold_s)
        if pin.over or not 0 <= reader < readers or (pin.readers and pin.readers != readers):
            return None
        if reader in pin.closed or pin.open.get(reader, opener) != opener:
            return None
        if prompt != (pin.prompt if pin.known else pin.wanted or prompt):
            return None
        pin.readers, pin.wanted = readers, prompt
        pin.open[reader] = opener
        if pin.held:
            pin.deadline = now + self.hold_s
        return pin

    def close(self, transfer: str, opener: Hashable, now: float, *, reader: int = 0, wait: bool = False) -> bool:
        """A reader is done, or gives up; whether the blocks were held until now. The last one ends the pin.

        Closing a pin that nobody has opened gives it up for all readers; where it has not even begun (``wait``), it
        ends as soon as it does.
        """
        self.expire(now)
        pin = self.pins.get(transfer)
        if pin is None:
            if wait and transfer not in self.past and len(self.pins) < limits.PINS_MAX:
                self.pins[transfer] = Pin(over=True, deadline=now + self.hold_s)
            return False
        if pin.over or pin.open.get(reader, opener) != opener or reader in pin.closed:
            return False
        pin.open.pop(reader, None)
        pin.closed.add(reader)
        if len(pin.closed) >= max(pin.readers, 1):
            self._finish(transfer)
        return True

    def lost(self, opener: Hashable) -> None:
        """A connection ended: so do the pins that readers had open over it."""
        for transfer in [t for t, pin in self.pins.items() if opener in pin.open.values()]:
            self._finish(transfer)

    def expire(self, now: float) -> list[str]:
        """End the pins whose deadline has come; their transfers."""
        late = [t for t, pin in self.pins.items() if pin.deadline is not None and pin.deadline <= now]
        for transfer in late:
            if self.pins[transfer].held:
                self._end(transfer)
                self.expired += 1
            else:  # nobody computes it here, or a reader of it was never heard of again
                self.revoke(transfer)
        return late

    def covers(self, transfer: str, first: Ints, last: Ints) -> bool:
        """Whether an open pin holds all blocks from ``first[i]`` to ``last[i]``, for every i."""
        pin = self.pins.get(transfer)
        if pin is None or not pin.open:
            return False
        held = np.unique(np.array(pin.blocks, np.int64))
        inside = np.searchsorted(held, last, side="right") - np.searchsorted(held, first, side="left")
        return bool((inside == last - first + 1).all())

    def _learn(self, transfer: str, pin: Pin, request: str, prompt: bytes) -> None:
        """Whose blocks these are. Readers that came first, for another prompt, get none of them."""
        pin.request, pin.prompt, pin.known = request, prompt, True
        if pin.wanted and pin.wanted != prompt:
            pin.over = True
            pin.open.clear()
            self.refused.add(transfer)

    def _finish(self, transfer: str) -> None:
        """Nobody reads it any more."""
        pin = self.pins[transfer]
        pin.over = True
        pin.open.clear()
        if pin.held:
            self._end(transfer)
        else:
            self.refused.add(transfer)  # readers that are left get nothing more

    def _end(self, transfer: str) -> None:
        self.ended.append(self.pins.pop(transfer).request)
        self._forget(transfer)

    def _forget(self, transfer: str) -> None:
        self.changed.add(transfer)
        while len(self.past) >= limits.PAST_TRANSFERS_MAX:
            del self.past[next(iter(self.past))]
        self.past[transfer] = None
