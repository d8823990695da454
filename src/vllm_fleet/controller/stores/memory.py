"""A store in memory, with faults to order: for simulations and tests, ours and users'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_fleet.controller.journal import NO_MARK, Loaded, Mark, Record, decode_records, encode_records
from vllm_fleet.controller.state import Entry
from vllm_fleet.controller.stores.contract import StoreFailed, StoreLost


class Crashed(Exception):
    """The simulated process died in the middle of writing."""


@dataclass
class MemoryDisk:
    """What survives the controller. ``crash_after_bytes``: the next append writes so many bytes and dies."""

    journal: bytes = b""
    mark: Mark = NO_MARK
    full: bool = False
    crash_after_bytes: int | None = None
    owner: object = None
    """The store that was opened last; earlier ones are shut out."""


class MemoryStore:
    """See contract.Store; nothing here survives the process, all of it survives the simulated one."""

    def __init__(self, disk: MemoryDisk | None = None) -> None:
        self.disk = MemoryDisk() if disk is None else disk
        self.disk.owner = self
        self._appended_bytes = 0

    @property
    def appended_bytes(self) -> int:
        return self._appended_bytes

    def load(self) -> Loaded:
        loaded = decode_records(self.disk.journal).compared(self.disk.mark)
        if loaded.ahead is None:  # the last change may have been saved, and its process died before it noted that
            self.disk.mark = NO_MARK.after(loaded.records)
        return loaded

    def append(self, entries: Sequence[Entry]) -> None:
        self._check_owner()
        written = encode_records(entries)
        if self.disk.crash_after_bytes is not None:
            self.disk.journal += written[: self.disk.crash_after_bytes]
            self.disk.crash_after_bytes = None
            raise Crashed
        if self.disk.full:
            self.disk.journal += written[: len(written) // 2]
            raise StoreFailed("the simulated disk is full")
        self.disk.journal += written
        self.disk.mark = self.disk.mark.after(entries)
        self._appended_bytes += len(written)

    def rewrite(self, records: Sequence[Record]) -> None:
        self._check_owner()
        if self.disk.full:
            raise StoreFailed("the simulated disk is full")
        self.disk.journal = encode_records(records)
        self.disk.mark = NO_MARK.after(records)
        self._appended_bytes = 0

    def close(self) -> None:
        pass

    def _check_owner(self) -> None:
        if self.disk.owner is not self:
            raise StoreLost("the simulated disk has another owner")
