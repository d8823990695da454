"""What the controller asks of the place that keeps its journal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from vllm_fleet.controller.journal import Loaded, Record
from vllm_fleet.controller.state import Entry
from vllm_fleet.core.errors import Busy, FleetError


class StoreFailed(Busy):
    """The journal could not be written; the message says why. Saving may work again later, through ``rewrite``."""


class StoreLost(FleetError):
    """Somebody else has owned the journal since: nothing was written, and this store never writes again. Whoever held
    it must stop to speak for the fleet.
    """


class Store(Protocol):
    """One journal with one owner at a time.

    Promises:
    - When ``append`` or ``rewrite`` returns, what it was given survives a crash of the process and of the machine.
    - Records come back from ``load`` in the order in which they were given.
    - An ``append`` that raises StoreFailed may have saved all, a part or none of its entries; a ``rewrite`` that does
      may have replaced the journal or not, but nothing between. After either, and after a ``load`` that dropped bytes
      or found no record, ``append`` must not be called before a ``rewrite`` has succeeded.
    - Two owners never both write. Either the store keeps others out from construction to ``close`` (``embedded``), or
      a later owner shuts it out (``etcd``): from the moment the later one has begun to ``load``, nothing of the earlier
      one arrives any more, not even what it sent before, and its calls raise StoreLost. ``close`` may be called twice.
    - Calls block, may come from any thread, and never overlap.
    """

    @property
    def appended_bytes(self) -> int:
        """Bytes of changes since the journal was last written anew."""
        ...

    def load(self) -> Loaded:
        """The longest valid prefix of the journal; an absent journal is an empty one. Raises StoreFailed where the
        journal is elsewhere and cannot be reached.
        """
        ...

    def append(self, entries: Sequence[Entry]) -> None:
        """Save changes behind the others. Raises StoreFailed or StoreLost."""
        ...

    def rewrite(self, records: Sequence[Record]) -> None:
        """Replace the journal by ``records``. Raises StoreFailed or StoreLost."""
        ...

    def close(self) -> None:
        """Let go of the journal."""
        ...
