"""Joining NCCL communicators, which may wait for a peer for ever, in threads of their own; waiting with a deadline.

From NVIDIA's NCCL (src/bootstrap.cc, src/init.cc): making an id starts a thread with a listening socket that ends only
when every rank has come, and joining a blocking communicator cannot be called off. So whoever has said that it comes
does come, in every lane, even if only to leave at once; else the other side would keep a thread and its sockets.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from vllm_fleet.core import limits
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import FleetError, LinkError
from vllm_fleet.fabric.contract import TransferError
from vllm_fleet.fabric.rendezvous import Meeting
from vllm_fleet.fabric.transports.cuda.nccl_tuning import Tuning

T = TypeVar("T")

Watch = Callable[[], None]
"""Called while waiting; raises the FleetError that ends the wait."""

NAP_S = 0.0002
"""A wait looks every NAP_S, but every LOOK_S from NEAR_S before its end is expected until LATE_S after."""
LOOK_S = 5e-6
NEAR_S = 0.0003
LATE_S = 0.002

ABORT_S = 5.0
"""Whoever ends a communicator waits so long for it to be freed."""

EXTRA = "pip install 'vllm-fleet[nccl]'"


def library() -> Any:
    """The module nccl.core. LinkError, naming what to install, when it or CUDA is missing."""
    try:
        import torch
    except ImportError as error:
        raise LinkError(f"nccl needs torch with CUDA, which cannot be imported: {error}; {EXTRA}") from error
    if not torch.cuda.is_available():
        raise LinkError("nccl needs torch with CUDA and a CUDA device, and torch sees none")
    try:
        return importlib.import_module("nccl.core")
    except ImportError as error:
        raise LinkError(f"nccl needs the package nccl4py, which cannot be imported: {error}; {EXTRA}") from error


@contextlib.contextmanager
def mapped(what: str) -> Iterator[None]:
    """Errors of NCCL and CUDA as TransferErrors; ``what`` failed."""
    try:
        yield
    except FleetError:
        raise
    except Exception as error:  # NCCLError and NcclInvalid derive from Exception only
        raise TransferError(f"{what} failed: {type(error).__name__}: {error}") from error


def poll(
    done: Callable[[], bool], watch: Watch, deadline: Deadline, who: str, what: str, expected_s: float = 0.0
) -> None:
    """Wait until ``done()``, which is not before ``expected_s`` from now.

    Raises what ``watch`` raises, and DeadlineExceeded naming ``who`` and ``what``.
    """
    expected = time.monotonic() + expected_s
    with _precise_sleep():
        while not done():
            watch()
            deadline.check(who, what)
            late = time.monotonic() - expected
            time.sleep(LOOK_S if -NEAR_S < late < LATE_S else NAP_S)


_PR_SET_TIMERSLACK = 29  # linux/prctl.h


@contextlib.contextmanager
def _precise_sleep() -> Iterator[None]:
    """This thread's sleeps end when they should, not 50 us later, the kernel's default.

    Sleeping so is quicker than not to sleep at all: a thread that spins slows the other one of its core down.
    """
    prctl = _libc().prctl
    prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(1))
    try:
        yield
    finally:
        prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(0))  # the default again


@functools.cache
def _libc() -> ctypes.PyDLL:
    return ctypes.PyDLL(None)


_apart = 0
_apart_lock = threading.Lock()


def calls_apart() -> int:
    """Threads that wait inside NCCL for a peer, those included that nobody waits for any more."""
    return _apart


def settle(deadline: Deadline) -> bool:
    """Wait for all such threads of this process, and so for NCCL's sockets; whether they have ended by then."""
    while calls_apart():
        if deadline.expired():
            return False
        time.sleep(NAP_S)
    return True


def _start_apart(work: Callable[[], None], name: str) -> threading.Thread:
    def counted() -> None:
        global _apart
        try:
            work()
        finally:
            with _apart_lock:
                _apart -= 1

    global _apart
    with _apart_lock:
        _apart += 1
    thread = threading.Thread(target=counted, name=name, daemon=True)
    try:
        thread.start()
    except BaseException:
        with _apart_lock:
            _apart -= 1
        raise
    return thread


def run_apart(call: Callable[[], T], device: int, watch: Watch, deadline: Deadline, what: str) -> T:
    """Carry out a call that may block for longer than it should in a thread of its own, on a CUDA device.

    Raises what it raises, what ``watch`` raises, and DeadlineExceeded; the thread then goes on until NCCL lets it.
    """
    import torch

    ended: Future[T] = Future()

    def work() -> None:
        try:
            with torch.cuda.device(device):
                result = call()
        except BaseException as error:  # noqa: BLE001 - raised in the waiting thread
            ended.set_exception(error)
        else:
            ended.set_result(result)

    _start_apart(work, "fleet-nccl-call")
    poll(ended.done, watch, deadline, "the peer", what)
    return ended.result()


def come_and_leave(meeting: Meeting, device: int, tuning: Tuning) -> None:
    """Join a meeting in a thread of its own and leave at once, so that nobody waits for this worker there for ever.

    For a worker that has said, or may be understood to have said, that it comes, and now has no use for it.
    """
    import torch

    def work() -> None:
        with contextlib.suppress(FleetError), torch.cuda.device(device):
            joining = Joining(meeting, tuning)
            joining.give_up()
            joining.join()

    _start_apart(work, "fleet-nccl-leave")


def call_off(group_id: bytes, device: int, tuning: Tuning) -> None:
    """End what making an id has started, when it is certain that nobody else has heard of it or will come."""
    come_and_leave(Meeting(rank=0, ranks=1, epoch=0, group_id=group_id), device, tuning)


class Joining:
    """The communicators of one meeting, one for each lane."""

    def __init__(self, meeting: Meeting, tuning: Tuning) -> None:
        self._nccl, self._meeting = library(), meeting
        self._config = self._nccl.NCCLConfig(blocking=True, max_ctas=tuning.ctas_max)
        self._lock = threading.Lock()
        self._given_up = False
        self._made: list[Any] = []

    def join(self) -> list[Any]:
        """Join every lane, waiting for the peer in each; nccl.core.Communicators, of which give_up() disposes."""
        failure: Exception | None = None
        group_id, size = self._meeting.group_id, limits.NCCL_ID_BYTES
        for start in range(0, len(group_id), size):
            try:
                unique_id = self._nccl.UniqueId.from_bytes(group_id[start : start + size])
                made = self._nccl.Communicator.init(self._meeting.ranks, self._meeting.rank, unique_id, self._config)
            except Exception as error:  # noqa: BLE001 - raised below: the peer is in the other lanes all the same
                failure = failure or error
                continue
            with self._lock:
                self._made.append(made)
                given_up = self._given_up
            if given_up:
                self.give_up()
        with mapped("joining the NCCL communicator"):
            if failure is not None:
                raise failure
        return self._made

    def give_up(self) -> None:
        """End what is in flight and free the communicators, those too that join() has yet to make."""
        with self._lock:
            self._given_up = True
            made, self._made = self._made, []
        # At once: freeing one may wait for the kernels of another, which end by its own abort.
        threads = [_start_apart(_aborter(one), "fleet-nccl-abort") for one in made]
        until = time.monotonic() + ABORT_S
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))


def _aborter(made: Any) -> Callable[[], None]:
    def abort() -> None:
        with contextlib.suppress(TransferError), mapped("ncclCommAbort"):
            made.abort()

    return abort
