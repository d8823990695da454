"""Orders to a fleet that runs: change what it is to be, and wait until it has become so."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from vllm_fleet.config.connector import bearer, read_token
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import Busy, Corrupt, Fenced, FleetError, PeerGone
from vllm_fleet.launcher import desired
from vllm_fleet.launcher.desired import Slots
from vllm_fleet.launcher.down import not_running
from vllm_fleet.launcher.record import FleetRecord, read_record
from vllm_fleet.launcher.rundir import RunDir
from vllm_fleet.net.control_client import ControlClient
from vllm_fleet.wire.control import Desired, Member

CALL_S = 5.0
CALL_SETTING = "launcher.orders.CALL_S"
TRIES_MAX = 5  # where others change the fleet at the same time
POLL_S = 0.2

Edit = Callable[[Slots, FleetRecord], Slots]
"""What the fleet is to be, from what it was to be and what runs; raises BadRequest where that cannot be."""


@dataclass(frozen=True)
class Ordered:
    """A change that the controller has saved."""

    revision: int
    names: frozenset[str]
    """The instances it is about."""


class Orders:
    """Changes to one fleet."""

    def __init__(self, run: RunDir) -> None:
        """Raises FleetError when no such fleet runs, or nobody is there to carry orders out."""
        self._run = run
        record = self._record()
        if not record.supervised():
            raise FleetError(
                f"the supervisor of fleet '{record.fleet}' was killed: nobody can carry this out; what it started "
                f"serves on, stop it with: vllm-fleet down --name {record.fleet}"
            )
        if record.phase != "serving":
            raise Busy(f"fleet '{record.fleet}' is {record.phase}; try again when it serves")
        urls = [each.url for each in record.processes if each.kind == "controller"]
        self._client = ControlClient(urls, bearer(read_token(run.token_file)))
        self._members: dict[str, Member] = {}

    def change(self, edit: Edit) -> Ordered:
        """Have the fleet be what ``edit`` makes of it.

        Raises:
            PeerGone: the controller is away; nothing was changed that would not be changed by the same order again.
            BadRequest: it cannot be.
        """
        try:
            for _ in range(TRIES_MAX):
                found = self._client.desired(_deadline())
                if not found.revision:
                    raise Busy("the controller does not know yet what the fleet is to be; try again")
                record = self._record()
                slots = edit(found.instances, record)
                desired.check_gpus(slots, record.gpus)
                try:
                    made = self._client.desire(Desired(found.revision, slots), _deadline())
                except Fenced:
                    continue  # somebody else came first
                return Ordered(made.revision, frozenset(desired.concerned(found.instances, slots)))
        except PeerGone as error:
            name = self._run.folder.name
            raise PeerGone(
                f"the controller of fleet '{name}' is away ({error}); the fleet serves on as it is, try again later"
            ) from error
        raise Busy(f"others changed the fleet {TRIES_MAX} times meanwhile; try again")

    def wait(self, ordered: Ordered, show: Callable[[FleetRecord], None], timeout_s: float) -> FleetRecord:
        """Wait until it is so; the record of the fleet then.

        Raises:
            FleetError: it will not be so, or not within ``timeout_s``; the order stands.
        """
        until = time.monotonic() + timeout_s
        while True:
            record = self._record()
            show(record)
            failed = desired.failures(record, ordered.revision, ordered.names)
            if failed:
                raise FleetError("; ".join(failed))
            left = desired.pending(record, self._look(), ordered.revision, ordered.names)
            if not left:
                return record
            if time.monotonic() >= until:
                raise FleetError(f"not done within {timeout_s:g} s (--timeout), it goes on: {'; '.join(left)}")
            time.sleep(POLL_S)

    def _record(self) -> FleetRecord:
        record = read_record(self._run)
        if record is None:
            raise not_running(self._run)
        return record

    def _look(self) -> dict[str, Member]:
        """The members as last known: while the controller is away they stay."""
        with contextlib.suppress(PeerGone, Busy, Corrupt):
            self._members = {member.name: member for member in self._client.snapshot(_deadline()).members}
        return self._members


def _deadline() -> Deadline:
    return Deadline.after(CALL_S, CALL_SETTING)
