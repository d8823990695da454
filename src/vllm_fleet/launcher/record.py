"""fleet.json: what a supervisor says about its fleet, for the other commands and for cleaning up after it."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import Struct

from vllm_fleet.core import limits
from vllm_fleet.core.errors import Corrupt
from vllm_fleet.launcher.leftovers import Leftover
from vllm_fleet.launcher.processes import ProcessId, alive, boot_id
from vllm_fleet.launcher.rundir import RunDir
from vllm_fleet.launcher.spec import Kind
from vllm_fleet.wire.control import Slot

Phase = Literal["starting", "serving", "stopping", "stopped", "failed"]
ChildState = Literal[
    "waiting", "starting", "ready", "draining", "restarting", "given_up", "gone", "stopping", "stopped"
]
"""``draining``: gets no new requests, stops when it is idle. ``given_up``: died too often."""


class ProcessRecord(Struct, frozen=True):
    """One process of the fleet."""

    name: str
    kind: Kind
    role: str
    url: str
    state: ChildState
    since: float
    """Wall clock of the last change of state; for display."""
    log: str
    id: ProcessId | None = None
    tree: tuple[ProcessId, ...] = ()
    leftovers: tuple[Leftover, ...] = ()
    tmp: str | None = None
    ordered: int = 0
    """How many restarts had been asked for when it was started."""
    note: str = ""
    """Why it does not run, in a sentence."""
    node: str = ""
    """Address of the cluster's node it runs on; empty: beside the supervisor."""
    admin_url: str = ""
    """Where it answers its operators; empty: at ``url``."""


class GpuRecord(Struct, frozen=True):
    """The GPUs that are given out here."""

    total: int
    free: int
    each: dict[str, int]
    """How many an instance of a role gets."""


class FleetRecord(Struct, frozen=True):
    """One fleet."""

    fleet: str
    model: str
    """The name clients use."""
    boot: str
    supervisor: ProcessId
    phase: Phase
    stop_s: float
    processes: tuple[ProcessRecord, ...]
    reason: str = ""
    """Why it failed, in a sentence."""
    lines: tuple[str, ...] = ()
    """The lines of the failed process's log that matter."""
    revision: int = 0
    """Of what the fleet is to be, as far as the supervisor knows it."""
    desired: tuple[Slot, ...] = ()
    """What the fleet is to be."""
    roles_fixed: bool = False
    """Instances keep the role they were started with."""
    gpus: GpuRecord | None = None
    """None: the launcher gives none out."""

    def url(self, kind: Kind) -> str:
        """Where the router or the (first) controller answers."""
        return self.urls(kind)[0]

    def admin_url(self) -> str:
        """Where the router's metrics and timelines are."""
        return next(each.admin_url or each.url for each in self.processes if each.kind == "router")

    def urls(self, kind: Kind) -> list[str]:
        """Where all of a kind answer."""
        return [each.url for each in self.processes if each.kind == kind]

    def supervised(self) -> bool:
        """Whether the supervisor that wrote this still runs."""
        return self.boot == boot_id() and alive(self.supervisor)

    def living(self) -> set[ProcessId]:
        """The recorded processes that still run, helpers of instances included."""
        if self.boot != boot_id():
            return set()
        known = {id_ for each in self.processes for id_ in (each.id, *each.tree) if id_ is not None}
        return {id_ for id_ in known if alive(id_)}


_decode = msgspec.json.Decoder(FleetRecord).decode
_encode = msgspec.json.Encoder().encode


def write_record(run: RunDir, record: FleetRecord) -> None:
    """Replace fleet.json in one step."""
    run.write_private(run.record_file, _encode(record))


def read_record(run: RunDir) -> FleetRecord | None:
    """What runs, or None when nothing was recorded.

    Raises:
        Corrupt: the file is no record of this version.
    """
    try:
        with run.record_file.open("rb") as stream:
            return _decode(stream.read(limits.RUN_RECORD_BYTES_MAX))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Corrupt(f"cannot read {run.record_file}: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise Corrupt(f"{run.record_file} is damaged or of another version of vllm-fleet: {error}") from error
