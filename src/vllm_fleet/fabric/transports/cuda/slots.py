"""What direct reads are made of: tables of runs in pinned memory, the place where a nonce arrives, and who uses them.

The kernel reads a table from pinned memory, or from its copy in device memory where there was time to upload it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np

from vllm_fleet.fabric.plan import BlockCopyPlan, Ints
from vllm_fleet.fabric.transports.cuda import driver, quick
from vllm_fleet.fabric.transports.cuda.mapping import NONCE_BYTES

if TYPE_CHECKING:
    from vllm_fleet.fabric.transports.cuda.direct import DirectTransfer

ROW_WORDS: Final = 4
ROW_BYTES: Final = ROW_WORDS * 8
ROWS_MIN: Final = 2048  # of a table: 64 KiB
SLOT_BYTES: Final = 64  # a nonce and a spare copy of it, on a cache line of their own
SLOTS = 8  # direct transfers under way, and plans prepared
PREPARED_MAX = 4
"""Plans of one link that may be prepared and not read yet; the oldest gives way."""

FIRST_RUNS = 1024  # a small first launch: the GPU is at work while the rest of the table is filled
GROWTH = 8  # of each launch over the one before: copying 32 KiB takes 88 ns, filling its row a tenth of that
_NONE = np.zeros(NONCE_BYTES // 8, np.int64).data


class Table:
    """Rows of (source, target, bytes, unused), int64, in pinned memory; grows, never shrinks."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._pinned: driver.Pinned | None = None
        self._rows: Ints = np.zeros((0, ROW_WORDS), np.int64)
        self._uploads: list[int] = []  # grown out of: freed at the end, for cuMemFree waits for the whole device
        self._upload_rows = 0
        self.address = 0
        self.uploaded = 0
        """Address of the copy in device memory."""

    def rows(self, count: int, event: driver.Event) -> Ints:
        """Room for ``count`` rows; ``event`` is behind all that reads the old ones, which nothing needs any more."""
        if count > len(self._rows):
            self._rows = np.zeros((0, ROW_WORDS), np.int64)
            if self._pinned is not None:
                event.wait()
                self._pinned.close()
            self._pinned = driver.Pinned(self._device, _capacity(count) * ROW_BYTES)
            self._rows, self.address = self._pinned.words.reshape(-1, ROW_WORDS), self._pinned.address
        return self._rows[:count]

    def upload(self, count: int, stream: int) -> None:
        """Start copying the first rows to ``uploaded``. The device's context is current."""
        if count > self._upload_rows:
            self._upload_rows = _capacity(count)
            self.uploaded = driver.allocate(self._device, self._upload_rows * ROW_BYTES)
            self._uploads.append(self.uploaded)
        driver.copy_in(self.uploaded, self.address, count * ROW_BYTES, stream)

    def close(self) -> None:
        """Give it back; nothing reads it any more."""
        self._rows = np.zeros((0, ROW_WORDS), np.int64)
        if self._pinned is not None:
            self._pinned.close()
        uploads, self._uploads = self._uploads, []
        for address in uploads:
            driver.free(self._device, address)


class Slot:
    """One direct transfer's, or one prepared plan's. ``seen``: where the nonce arrives, four int64; host memory."""

    def __init__(self, device: int, pinned: driver.Pinned, index: int) -> None:
        count, at = NONCE_BYTES // 8, index * SLOT_BYTES // 8
        self.seen = pinned.words[at : at + count].data
        self.spare = pinned.words[at + count : at + 2 * count].data
        self.address = pinned.address + index * SLOT_BYTES
        self.table = Table(device)
        self.event = quick.Event(device)
        """Behind all that was started for this slot."""
        self.user: DirectTransfer | None = None
        self.plan: BlockCopyPlan | None = None
        """The plan that is prepared in it, ..."""
        self.count = 0
        """... its rows, ..."""
        self.turn = 0
        """... and its place among all that were."""

    def clear(self) -> None:
        """Forget what arrived before; nothing may be under way."""
        self.seen[:] = self.spare[:] = _NONE

    def close(self) -> None:
        self.table.close()
        self.event.close()


class Slots:
    """Which slot is whose. Not for two threads at once."""

    def __init__(self, slots: list[Slot]) -> None:
        self.all = slots
        self._turns = 0

    def free(self) -> Slot | None:
        """One that holds no prepared plan and whose transfer has ended."""
        for slot in self.all:
            if slot.plan is None and slot.user is None:
                return slot
        for slot in self.all:
            user = slot.user  # another thread may see its end, and let go of the slot, at any moment
            if slot.plan is None and (user is None or user.has_ended()):
                return slot
        return None

    def prepared(self, plan: BlockCopyPlan) -> Slot | None:
        """The one in which this very plan is prepared."""
        for slot in self.all:
            if slot.plan is plan:
                return slot
        return None

    def to_prepare(self) -> Slot | None:
        """One to prepare a plan in; the plan that was prepared first may lose its own."""
        held = [slot for slot in self.all if slot.plan is not None]
        if len(held) < PREPARED_MAX:
            return self.free()
        oldest = min(held, key=lambda slot: slot.turn)
        oldest.plan = None
        return oldest

    def hold(self, slot: Slot, plan: BlockCopyPlan, count: int) -> None:
        """``plan`` is prepared in ``slot``, in ``count`` rows."""
        self._turns += 1
        slot.plan, slot.count, slot.turn = plan, count, self._turns

    def forget(self, plan: BlockCopyPlan) -> None:
        """``plan`` is read in another way."""
        slot = self.prepared(plan)
        if slot is not None:
            slot.plan = None


def launches(count: int) -> Iterator[slice]:
    """The rows of each launch of a read whose table is filled as it goes."""
    start, size = 0, FIRST_RUNS
    while start < count:
        stop = start + size
        if count - stop <= size // 2:  # a launch more costs more than starting a little later
            stop = count
        yield slice(start, stop)
        start, size = stop, size * GROWTH


def fill(rows: Ints, plan: BlockCopyPlan, part: slice, source: Ints, target: Ints) -> None:
    """Rows for a part of a plan whose bounds were checked; addresses of the regions of both sides: int64 [regions]."""
    region = plan.region[part]
    np.add(source.take(region), plan.source[part], out=rows[:, 0])
    np.add(target.take(region), plan.target[part], out=rows[:, 1])
    rows[:, 2] = plan.nbytes[part]


def _capacity(count: int) -> int:
    return max(ROWS_MIN, 1 << (count - 1).bit_length())
