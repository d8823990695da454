"""Who carries out the transfers of an nccl link, and what deadline, cancel and close do to one that a waiter runs."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import DeadlineExceeded
from vllm_fleet.fabric.contract import TransferCancelledError, TransferError
from vllm_fleet.fabric.plan import BlockCopyPlan
from vllm_fleet.fabric.transports.cuda.nccl_link import NcclLink, NcclTransfer, Stop

ONE = np.array([1], np.int64)


def plan(number: int) -> BlockCopyPlan:
    return BlockCopyPlan("grant", ONE * 0, ONE * number, ONE * number, ONE)


def soon(seconds: float = 5.0) -> Deadline:
    return Deadline.after(seconds, "test")


class FakeCopier:
    """Does nothing for as long as it is held up, as the real one: looking at its Stop."""

    def __init__(self) -> None:
        self.done: list[tuple[int, threading.Thread]] = []
        self.held_up = threading.Event()
        self.began = threading.Semaphore(0)
        self.interrupted = 0
        self.prepared: list[int] = []
        self.closed_after: int | None = None
        self.fails: Exception | None = None

    def read(self, plan: BlockCopyPlan, cancelled: threading.Event) -> None:
        assert isinstance(cancelled, Stop)
        assert self.closed_after is None
        self.began.release()
        while self.held_up.is_set():
            cancelled.watch()
            assert cancelled.within(60, "inner").remaining() <= 60
            time.sleep(0.0005)
        cancelled.watch()
        if self.fails is not None:
            raise self.fails
        self.done.append((int(plan.source[0]), threading.current_thread()))

    write = read

    def prepare(self, plan: BlockCopyPlan) -> None:
        self.prepared.append(int(plan.source[0]))

    def interrupt(self) -> None:
        self.interrupted += 1

    def close(self) -> None:
        self.closed_after = len(self.done)


@pytest.fixture
def made() -> Iterator[tuple[FakeCopier, NcclLink]]:
    copier = FakeCopier()
    link = NcclLink("nccl", "peer", copier)
    yield copier, link
    copier.held_up.clear()
    link.close()
    assert copier.closed_after == len(copier.done)


def run(call: Callable[[], Any]) -> tuple[threading.Thread, list[BaseException]]:
    raised: list[BaseException] = []

    def work() -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, raised


def test_a_transfer_that_nobody_waits_for_is_carried_out(made: tuple[FakeCopier, NcclLink]) -> None:
    copier, link = made
    transfer = link.read(plan(1))
    until = soon()
    while not transfer.done():
        until.check("the test", "waiting")
        time.sleep(0.0005)
    assert [number for number, _ in copier.done] == [1]


def test_transfers_keep_their_order_whoever_carries_them_out(made: tuple[FakeCopier, NcclLink]) -> None:
    copier, link = made
    rng = np.random.default_rng(0)
    for _ in range(50):
        copier.done.clear()
        transfers = [link.read(plan(number)) for number in range(6)]
        threads = [run(functools.partial(transfers[number].wait, soon())) for number in rng.permutation(6)]
        for thread, raised in threads:
            thread.join(5)
            assert not raised
        assert [number for number, _ in copier.done] == list(range(6))


def test_the_waiting_thread_carries_out_what_is_next(made: tuple[FakeCopier, NcclLink]) -> None:
    copier, _ = made
    transfer = NcclTransfer(copier.read, plan(7), copier.interrupt, None)
    transfer.wait(soon())
    assert copier.done == [(7, threading.current_thread())]
    transfer.run()  # of no effect any more
    follower = NcclTransfer(copier.read, plan(8), copier.interrupt, NcclTransfer(copier.read, plan(9), Mock(), None))
    with pytest.raises(DeadlineExceeded):
        follower.wait(soon(0.01))
    assert len(copier.done) == 1, "it went ahead of the one before it"


def test_the_link_s_thread_waits_for_a_waiter_to_end(made: tuple[FakeCopier, NcclLink]) -> None:
    copier, link = made
    copier.held_up.set()
    first = link.read(plan(1))
    waiter, raised = run(lambda: first.wait(soon()))
    copier.began.acquire()
    second = link.read(plan(2))
    assert not copier.began.acquire(timeout=0.02), "two transfers at once"
    assert not second.done()
    copier.held_up.clear()
    second.wait(soon())
    waiter.join(5)
    assert not raised
    assert [number for number, _ in copier.done] == [1, 2]


@pytest.mark.parametrize("claims", [True, False], ids=["by the waiter", "by the link"])
def test_the_deadline_ends_it(made: tuple[FakeCopier, NcclLink], claims: bool) -> None:
    copier, link = made
    copier.held_up.set()
    transfer = link.read(plan(1))
    if not claims:
        copier.began.acquire()
    with pytest.raises(DeadlineExceeded, match="setting: test"):
        transfer.wait(soon(0.02))
    with pytest.raises(TransferCancelledError):
        transfer.done()
    copier.held_up.clear()
    link.read(plan(2)).wait(soon())
    assert [number for number, _ in copier.done] == [2]


@pytest.mark.parametrize("end", ["cancel", "close"])
def test_another_thread_ends_what_a_waiter_carries_out(made: tuple[FakeCopier, NcclLink], end: str) -> None:
    copier, link = made
    copier.held_up.set()
    transfer = link.read(plan(1))
    waiter, raised = run(lambda: transfer.wait(soon()))
    copier.began.acquire()
    if end == "cancel":
        transfer.cancel()
    else:
        link.close()
    assert copier.interrupted == 1
    assert transfer.has_ended()  # type: ignore[attr-defined]
    waiter.join(5)
    assert isinstance(raised[0], TransferCancelledError)
    assert not copier.done


def test_a_failure_is_the_transfer_s_own(made: tuple[FakeCopier, NcclLink]) -> None:
    copier, link = made
    copier.fails = TransferError("refused")
    with pytest.raises(TransferError, match="refused"):
        link.read(plan(1)).wait(soon())
    copier.fails = None
    link.read(plan(2)).wait(soon())


def test_a_closed_link_takes_nothing(made: tuple[FakeCopier, NcclLink]) -> None:
    copier, link = made
    assert not link.is_closed()
    link.prepare(plan(4))
    link.close()
    assert link.is_closed()
    link.prepare(plan(5))
    assert copier.prepared == [4]
    with pytest.raises(TransferError, match="closed"):
        link.read(plan(1)).wait(soon())


def test_waits_inside_a_transfer_end_with_its_deadline() -> None:
    stop = Stop()
    assert stop.within(3, "inner").setting == "inner"
    stop.deadline = soon(2)
    assert stop.within(3, "inner") is stop.deadline
    assert stop.within(1, "inner").setting == "inner"
    stop.deadline = soon(-1)
    with pytest.raises(TransferCancelledError):
        stop.watch()
    assert stop.is_set()
