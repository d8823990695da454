"""What the controller asks of the place that keeps its journal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from vllm_fleet.controller.journal import Loaded, Record
from vllm_fleet.controller.state import Entry
from vllm_fleet.core.errors import Busy


class StoreFailed(Busy):
    """The journal could not be written; the message says why. Saving may work again later, through ``rewrite``."""


class Store(Protocol):
    """One journal with one owner.

    Promises:
    - When ``append`` or ``rewrite`` returns, what it was given survives a crash of the process and of the machine.
    - Records come back from ``load`` in the order in which they were given.
    - An ``append`` that raises StoreFailed may have saved all, a part or none of its entries; a ``rewrite`` that does
      may have replaced the journal or not, but nothing between. After either, and after a ``load`` that dropped bytes
      or found no record, ``append`` must not be called before a ``rewrite`` has succeeded.
    - No other process can use the same journal between construction and ``close``; ``close`` may be called twice.
    - Calls block, may come from any thread, and never overlap.
    """

    @property
    def appended_bytes(self) -> int:
        """Bytes of changes since the journal was last written anew."""
        ...

    def load(self) -> Loaded:
        """The longest valid prefix of the journal; an absent journal is an empty one."""
        ...

    def append(self, entries: Sequence[Entry]) -> None:
        """Save changes behind the others. Raises StoreFailed."""
        ...

    def rewrite(self, records: Sequence[Record]) -> None:
        """Replace the journal by ``records``. Raises StoreFailed."""
        ...

    def close(self) -> None:
        """Let go of the journal."""
        ...
