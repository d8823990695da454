"""Direct reads of a cuda_ipc link: a launch or a few on the caller's thread, of plans prepared before or not.

Prepared, a read is one launch whose table of runs is in device memory already. Not prepared, the plan's first runs are
launched while the table for the others is filled. Imports torch and triton.
"""

from __future__ import annotations

import contextlib
import time

import numpy as np

from vllm_fleet.core import limits
from vllm_fleet.core.errors import FleetError
from vllm_fleet.fabric.contract import KVPool, TransferError
from vllm_fleet.fabric.plan import BlockCopyPlan, Ints
from vllm_fleet.fabric.transports.cuda import driver, quick
from vllm_fleet.fabric.transports.cuda.direct import BYTES_PER_S, DirectTransfer
from vllm_fleet.fabric.transports.cuda.kernels import ReadQueue, part_bytes
from vllm_fleet.fabric.transports.cuda.mapping import NONCE_BYTES, Mapping
from vllm_fleet.fabric.transports.cuda.slots import ROW_BYTES, SLOT_BYTES, SLOTS, Slot, Slots, fill, launches
from vllm_fleet.fabric.work import check_bounds
from vllm_fleet.wire.fabric import PoolHandle

DIRECT_BYTES_MAX = 4 << 30
DIRECT_RUNS_MAX = 2 * limits.RUNS_MAX  # 1.5 ms to fill the table, on the caller's thread
DIRECT_S_MAX = 12e-3  # of direct transfers under way, at BYTES_PER_S: the longest a cancel waits over NVLink


class DirectReads:
    """All direct reads of one link, on its stream. For one thread at a time, while the mapping is in use."""

    def __init__(
        self, pool: KVPool, peer: PoolHandle, mapping: Mapping, nonce: bytes, stream: driver.Stream, name: str
    ) -> None:
        device = stream.device
        self._own = np.array([region.address for region in pool.regions], np.int64)
        self._sizes = np.array(peer.region_bytes, np.int64), np.array(pool.sizes, np.int64)
        self._mapping, self._nonce, self._name = mapping, nonce, name
        self._stream = stream
        self._here = quick.Here(device)
        self._queue = ReadQueue(device, stream.cuda_stream, mapping.nonce)
        self._pinned = driver.Pinned(device, SLOT_BYTES * SLOTS)
        self._slots = Slots([Slot(device, self._pinned, index) for index in range(SLOTS)])
        self._busy_until = 0.0  # when what was started is expected to have ended, on time.monotonic()

    def probe(self) -> None:
        """Read the nonce as blocks are read, and as it is checked. TransferError when it is another."""
        slot = self._slots.all[0]
        slot.clear()
        slot.table.rows(1, slot.event)[0] = (self._mapping.nonce, slot.address + NONCE_BYTES, NONCE_BYTES, 0)
        with self._here:
            self._queue.start(slot.table.address, 1, slot.address)
        self._stream.synchronize()
        for found in (slot.spare, slot.seen):
            check_nonce(found.tobytes(), self._nonce, self._name)

    def prepare(self, plan: BlockCopyPlan) -> None:
        """Fill and upload the table of a plan, if it may be read directly and there is room. Raises nothing."""
        if not self._is_short(plan) or self._slots.prepared(plan) is not None:
            return
        with contextlib.suppress(FleetError):  # start() will say what is wrong
            runs = self._checked(plan)
            slot = self._slots.to_prepare()
            if slot is None:
                return
            rows = slot.table.rows(len(runs), slot.event)
            fill(rows, runs, slice(0, len(runs)), self._mapping.regions, self._own)
            with self._here:
                slot.table.upload(len(runs), self._stream.cuda_stream)
                slot.event.record(self._stream.cuda_stream)
            self._slots.hold(slot, plan, len(runs))

    def forget(self, plan: BlockCopyPlan) -> None:
        """Give up what was prepared for a plan."""
        self._slots.forget(plan)

    def start(self, plan: BlockCopyPlan) -> DirectTransfer | None:
        """Start a read, or one that has failed already; None when the plan is long or empty, or much is under way."""
        now = time.monotonic()
        prepared = self._slots.prepared(plan)
        if prepared is None and not self._is_short(plan):
            return None
        starts, copy_s = max(now, self._busy_until), plan.total_bytes / BYTES_PER_S
        slot = prepared or self._slots.free()
        if slot is None or starts + copy_s > now + DIRECT_S_MAX:
            return None
        slot.clear()
        transfer = DirectTransfer(slot, self._nonce, self._name, starts, copy_s)
        slot.plan, slot.user = None, transfer
        try:
            if prepared is None:
                self._launch(self._checked(plan), slot)
            else:
                with self._here:
                    self._queue.start(slot.table.uploaded, slot.count, slot.address)
                    slot.event.record(self._stream.cuda_stream)
            self._busy_until = starts + copy_s
        except FleetError as error:
            self._stream.synchronize()
            transfer.fail(error)
        return transfer

    def cancel(self) -> None:
        """Cancel all that was started; by any thread."""
        for slot in self._slots.all:
            user = slot.user
            if user is not None:
                user.cancel()

    def close(self) -> None:
        """Give everything back; the stream has ended all."""
        self._queue.close()
        for slot in self._slots.all:
            slot.close()
        self._pinned.close()

    def _is_short(self, plan: BlockCopyPlan) -> bool:
        return 0 < len(plan) <= DIRECT_RUNS_MAX and plan.total_bytes <= DIRECT_BYTES_MAX

    def _checked(self, plan: BlockCopyPlan) -> BlockCopyPlan:
        """The plan in runs of a good length; TransferError when it reaches outside a pool."""
        check_plan(plan, *self._sizes)
        return plan.split(part_bytes(plan.total_bytes))

    def _launch(self, runs: BlockCopyPlan, slot: Slot) -> None:
        """Start copying runs, the first ones while the table for the others is filled; then the nonce."""
        table, count, stream = slot.table, len(runs), self._stream.cuda_stream
        rows = table.rows(count, slot.event)
        for part in launches(count):
            fill(rows[part], runs, part, self._mapping.regions, self._own)
            is_last = part.stop == count
            with self._here:
                address = table.address + part.start * ROW_BYTES
                self._queue.start(address, part.stop - part.start, slot.address if is_last else 0)
                if is_last:
                    slot.event.record(stream)


def check_nonce(found: bytes, nonce: bytes, peer: str) -> None:
    """TransferError unless the registration stood until its nonce was read.

    Whether the owner still lives does not matter: what was read is right, for memory outlives its owner while it is
    mapped.
    """
    if found != nonce:
        raise TransferError(f"{peer} does not hold what it registered: withdrawn or replaced")


def check_plan(plan: BlockCopyPlan, source_bytes: Ints, target_bytes: Ints) -> None:
    """As check_bounds, of a plan that is not empty; in no time where the regions of a side are equally long."""
    regions = min(len(source_bytes), len(target_bytes))
    if not regions or not plan.extent.inside(regions, int(source_bytes.min()), int(target_bytes.min())):
        check_bounds(plan, source_bytes, target_bytes)
