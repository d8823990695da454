"""Direct reads of cuda_ipc without a GPU: how the end of one is seen, whose slot is whose, how launches are cut."""

from __future__ import annotations

import ctypes
import gc
import threading
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import DeadlineExceeded, LinkError
from vllm_fleet.fabric.contract import TransferCancelledError, TransferError
from vllm_fleet.fabric.plan import BlockCopyPlan
from vllm_fleet.fabric.transports.cuda import quick, slots
from vllm_fleet.fabric.transports.cuda.direct import DirectTransfer
from vllm_fleet.fabric.transports.cuda.slots import PREPARED_MAX, SLOTS, Slot, Slots, fill, launches

NONCE = bytes(range(1, 33))
FAR_S = 1e6


class Event:
    def __init__(self, *answers: bool | LinkError) -> None:
        self.answers = list(answers)
        self.asked = self.waited = 0

    def passed(self) -> bool:
        self.asked += 1
        answer = self.answers.pop(0)
        if isinstance(answer, LinkError):
            raise answer
        return answer

    def wait(self) -> None:
        self.waited += 1


def make_slot(event: Event | None = None) -> Slot:
    made = SimpleNamespace(
        seen=np.zeros(4, np.int64).data, event=event or Event(), plan=None, user=None, count=0, turn=0
    )
    return cast(Slot, made)


def arrive(slot: Slot, nonce: bytes = NONCE) -> None:
    slot.seen[:] = np.frombuffer(nonce, np.int64).data


def transfer_in(slot: Slot, starts: float = 0.0) -> DirectTransfer:
    """One that was expected to end long ago (``starts`` 0), or in the far future."""
    slot.user = DirectTransfer(slot, NONCE, "the peer", starts, 0.0)
    return slot.user


def soon() -> Deadline:
    return Deadline.after(5, "test")


def test_a_nonce_that_arrives_ends_the_transfer_without_asking_the_event() -> None:
    slot = make_slot()
    transfer = transfer_in(slot, FAR_S)
    assert not transfer.done()
    arrive(slot)
    transfer.wait(soon())
    assert transfer.done()
    assert slot.user is None
    arrive(slot, bytes(32))  # the slot is another's now
    assert transfer.done()
    transfer.cancel()
    assert transfer.done()


def test_a_nonce_that_is_half_there_is_not_the_end() -> None:
    slot = make_slot()
    transfer = transfer_in(slot, FAR_S)
    arrive(slot, NONCE[:8] + bytes(24))
    assert not transfer.done()
    arrive(slot)
    assert transfer.done()


def test_a_late_nonce_is_asked_after_and_another_one_fails_the_transfer() -> None:
    event = Event(False, True)
    slot = make_slot(event)
    transfer = transfer_in(slot)
    arrive(slot, NONCE[:31] + b"\0")
    with pytest.raises(TransferError, match="the peer does not hold what it registered"):
        transfer.wait(soon())
    assert event.asked == 2
    assert slot.user is None
    with pytest.raises(TransferError):
        transfer.done()


def test_a_kernel_that_failed_fails_the_transfer() -> None:
    slot = make_slot(Event(LinkError("a kernel failed: CUDA_ERROR_ILLEGAL_ADDRESS")))
    transfer = transfer_in(slot)
    with pytest.raises(TransferError, match="ILLEGAL_ADDRESS"):
        transfer.wait(soon())


def test_cancel_waits_for_the_event_and_lets_go_of_the_slot() -> None:
    event = Event()
    slot = make_slot(event)
    transfer = transfer_in(slot, FAR_S)
    transfer.cancel()
    transfer.cancel()
    assert event.waited == 1
    assert slot.user is None
    arrive(slot)
    with pytest.raises(TransferCancelledError):
        transfer.done()


def test_a_deadline_cancels() -> None:
    event = Event()
    transfer = transfer_in(make_slot(event), FAR_S)
    with pytest.raises(DeadlineExceeded):
        transfer.wait(Deadline.after(0.0, "test"))
    assert event.waited == 1


def test_the_end_may_come_while_one_waits() -> None:
    slot = make_slot()
    transfer = transfer_in(slot, 0.0)
    transfer._doubt = FAR_S * 1e3  # the event is never asked
    thread = threading.Thread(target=arrive, args=(slot,))
    thread.start()
    transfer.wait(soon())
    thread.join()


@given(st.integers(0, 200_000))
def test_launches_cover_all_rows_once_and_none_is_tiny(count: int) -> None:
    parts = list(launches(count))
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])][: len(parts)]
    assert (parts[-1].stop if parts else 0) == count
    assert all(part.stop - part.start > slots.FIRST_RUNS // 2 for part in parts[1:])
    assert len(parts) <= 4


def test_rows_hold_addresses() -> None:
    columns = np.array([[0, 1, 1], [8, 16, 0], [1, 2, 3], [4, 5, 6]], np.int64)
    plan = BlockCopyPlan("t", columns[0], columns[1], columns[2], columns[3])
    rows = np.zeros((2, 4), np.int64)
    fill(rows, plan, slice(1, 3), np.array([1000, 2000]), np.array([10_000, 20_000]))
    assert rows[:, :3].tolist() == [[2016, 20_002, 5], [2000, 20_003, 6]]


def test_slots_are_free_when_their_transfer_has_ended() -> None:
    made = [make_slot() for _ in range(3)]
    all_slots = Slots(made)
    transfers = [transfer_in(slot, FAR_S) for slot in made]
    assert all_slots.free() is None
    arrive(made[1])
    assert all_slots.free() is made[1]
    assert transfers[1].done()
    assert made[1].user is None


def test_prepared_plans_take_part_of_the_slots_and_the_oldest_gives_way() -> None:
    empty = np.zeros(0, np.int64)
    all_slots = Slots([make_slot() for _ in range(SLOTS)])
    plans = [BlockCopyPlan("t", empty, empty, empty, empty) for _ in range(PREPARED_MAX + 1)]
    for plan in plans:
        slot = all_slots.to_prepare()
        assert slot is not None
        all_slots.hold(slot, plan, 1)
    assert all_slots.prepared(plans[0]) is None
    assert all(all_slots.prepared(plan) is not None for plan in plans[1:])
    for _ in range(SLOTS - PREPARED_MAX):
        free = all_slots.free()
        assert free is not None
        transfer_in(free, FAR_S)
    assert all_slots.free() is None
    all_slots.forget(plans[1])
    all_slots.forget(plans[1])
    assert all_slots.free() is not None


ENTRY = """
.visible .entry read_kernel(
	.param .u64 read_kernel_param_0,
	.param .u32 read_kernel_param_1,
	.param .u64 .ptr .global .align 1 read_kernel_param_2
)
.reqntid 256
"""


def test_parameters_are_read_from_ptx() -> None:
    found = quick.parameters(ENTRY, "read_kernel", 2)
    assert found is not None
    assert [one.__name__ for one in found] == ["c_long", "c_int", "c_long"]
    assert quick.parameters(ENTRY, "read_kernel", 1) is None, "a plain integer where scratch memory was expected"
    assert quick.parameters(ENTRY, "read_kernel", 3) is None, "a pointer where an integer was expected"
    assert quick.parameters(ENTRY, "read", 2) is None
    assert quick.parameters(ENTRY.replace(".u32", ".f32"), "read_kernel", 2) is None
    assert quick.parameters(ENTRY.replace(".u32", ".align 8 .b8"), "read_kernel", 2) is None


def compiled(**metadata: Any) -> quick.Compiled:
    usual = {"num_ctas": 1, "global_scratch_size": 0, "num_warps": 8, "shared": 4096}
    made = SimpleNamespace(
        name="read_kernel", function=5, asm={"ptx": ENTRY}, metadata=SimpleNamespace(**{**usual, **metadata})
    )
    return cast(quick.Compiled, made)


def test_a_launch_passes_what_the_driver_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    given_: list[Any] = []

    def start(function: Any, *rest: Any) -> int:
        addresses = rest[8]
        values = [ctypes.c_int64.from_address(addresses[0]).value, ctypes.c_int32.from_address(addresses[1]).value]
        given_.append((function.value, *rest[:8], *values, ctypes.c_int64.from_address(addresses[2]).value))
        return 0

    monkeypatch.setattr(quick, "_start_function", lambda: start)
    launch = quick.launcher(compiled(), 2)
    gc.collect()
    assert launch is not None
    with pytest.raises(TypeError, match="takes 2 arguments"):
        launch(64, 77, (1,))
    assert launch(64, 77, (1 << 45, 1024)) == 0
    assert launch(3, 77, ((1 << 45) + 8, 3)) == 0
    assert given_ == [
        (5, 64, 1, 1, 256, 1, 1, 4096, 77, 1 << 45, 1024, 0),
        (5, 3, 1, 1, 256, 1, 1, 4096, 77, (1 << 45) + 8, 3, 0),
    ]


@pytest.mark.parametrize("metadata", [{"num_ctas": 2}, {"global_scratch_size": 8}, {"launch_pdl": True}])
def test_kernels_that_need_more_are_left_to_triton(metadata: dict[str, Any]) -> None:
    assert quick.launcher(compiled(**metadata), 2) is None
