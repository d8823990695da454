"""Stopping a fleet from outside: its supervisor does it, or, where that was killed, we do."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable

from vllm_fleet.core.errors import Corrupt, DeadlineExceeded, FleetError
from vllm_fleet.launcher import leftovers, processes
from vllm_fleet.launcher.reactor import KILL_GRACE_S
from vllm_fleet.launcher.record import FleetRecord, read_record
from vllm_fleet.launcher.rundir import RunDir

ROOM_S = 2.0  # for the supervisor's own end, past the last kill


def down(run: RunDir, timeout_s: float | None = None, show: Callable[[FleetRecord], None] | None = None) -> str:
    """Stop the fleet of this run folder; a sentence about what was done.

    Args:
        timeout_s: what runs then is killed; by default running requests get launcher.drain_s, and then the processes
            launcher.stop_s.
        show: told how it goes, a few times a second.

    Raises:
        FleetError: no such fleet runs, or something of it cannot be stopped.
    """
    record = read_record(run)
    if record is None:
        raise not_running(run)
    name = record.fleet
    if record.supervised() and run.held():
        processes.send(record.supervisor, signal.SIGTERM)
        patience = record.stop_s + KILL_GRACE_S + ROOM_S if timeout_s is None else timeout_s

        def over() -> bool:
            now = _now(run)
            if show is not None and now is not None:
                show(now)
            return _over(run, record)

        if not _wait(over, patience):
            processes.send(record.supervisor, signal.SIGTERM)  # the second one kills at once
            if not _wait(lambda: _over(run, record), KILL_GRACE_S + ROOM_S):
                processes.kill([record.supervisor], KILL_GRACE_S)
                sweep(run)
                return f"fleet '{name}' did not stop within {patience:g} s; it was killed"
        return f"fleet '{name}' is down"
    if not record.living():
        run.clear()
        raise not_running(run)
    count = sweep(run)
    return f"the supervisor of fleet '{name}' had been killed; {count} processes it left were stopped"


def not_running(run: RunDir) -> FleetError:
    """The error for a fleet that does not run."""
    return FleetError(f"no fleet named '{run.folder.name}' runs (looked in {run.folder})")


def sweep(run: RunDir) -> int:
    """Stop and remove all that is recorded, without a supervisor's help; the number of processes stopped.

    Raises:
        Busy: a supervisor has taken the folder in the meantime.
        DeadlineExceeded: a process could not be killed.
    """
    run.acquire()
    try:
        record = read_record(run)
        if record is None:
            return 0
        living = record.living()
        rows = processes.table()
        for each in record.processes:
            members = living.intersection(each.tree)
            if each.id is not None and each.id in living:
                living |= processes.tree(each.id.pid, rows, known=members)
        found = {one for each in record.processes for one in each.leftovers} | leftovers.collect(living)
        for process in living:
            processes.send(process, signal.SIGTERM)
        left = processes.kill(processes.wait(living, record.stop_s), KILL_GRACE_S)
        if left:
            pids = ", ".join(str(one.pid) for one in left)
            raise DeadlineExceeded(f"process {pids}", "dying", KILL_GRACE_S, "none: it hangs in the kernel")
        leftovers.remove(found)
        for each in record.processes:
            if each.tmp is not None:
                shutil.rmtree(each.tmp, ignore_errors=True)
        run.clear()
        return len(living)
    finally:
        run.release()


def _now(run: RunDir) -> FleetRecord | None:
    """None: the supervisor has removed it, or is writing it."""
    try:
        return read_record(run)
    except Corrupt:
        return None


def _over(run: RunDir, record: FleetRecord) -> bool:
    return not run.held() and not record.supervised() and not record.living()


def _wait(done: Callable[[], bool], patience_s: float) -> bool:
    until = time.monotonic() + patience_s
    while not done():
        if time.monotonic() >= until:
            return False
        time.sleep(0.05)
    return True
