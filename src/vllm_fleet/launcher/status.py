"""What runs: the supervisor's record, merged with what the controller knows of its members."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from vllm_fleet.config.connector import bearer, read_token
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import Corrupt, FleetError, PeerGone
from vllm_fleet.launcher import ask
from vllm_fleet.launcher.desired import counts
from vllm_fleet.launcher.down import not_running
from vllm_fleet.launcher.processes import alive
from vllm_fleet.launcher.record import FleetRecord, ProcessRecord, read_record
from vllm_fleet.launcher.rundir import RunDir
from vllm_fleet.net.control_client import ControlClient

CONTROLLER_S = 3.0
METRICS_S = 1.0


@dataclass(frozen=True)
class Status:
    """One fleet, now."""

    record: FleetRecord
    states: dict[str, str]
    """State of each process by name."""
    remarks: tuple[str, ...]
    """What the user should know about how sure this is."""
    below: dict[str, dict[str, int]] = field(default_factory=dict)
    """Decode instance -> prefill worker -> prompts with fewer tokens are computed by decode, sooner than loaded."""

    def to_json(self) -> dict[str, Any]:
        """What ``status --json`` prints."""
        return {
            "router": {"url": self.record.url("router"), "admin_url": self.record.admin_url()},
            "controller": _controllers(self.record.urls("controller")),
            "instances": [
                {
                    "name": each.name,
                    "role": each.role,
                    "url": each.url,
                    "pid": None if each.id is None else each.id.pid,
                    "state": self.states[each.name],
                    **({"node": each.node} if each.node else {}),
                    "note": each.note,
                    "computes_below_tokens": self.below.get(each.name, {}),
                }
                for each in self.record.processes
                if each.kind == "instance"
            ],
            "desired": counts(self.record.desired),
        }


def status(run: RunDir) -> Status:
    """The fleet of this run folder.

    Raises:
        FleetError: no such fleet runs.
    """
    record = read_record(run)
    if record is None or not (record.supervised() or record.living()):
        raise not_running(run)
    remarks = []
    if not record.supervised():
        remarks.append(
            f"the supervisor of fleet '{record.fleet}' was killed; what it started is left, "
            f"and nothing restarts it; stop it with: vllm-fleet down --name {record.fleet}"
        )
    members: dict[str, str] = {}
    try:
        members = _members(run, record)
    except FleetError as error:
        remarks.append(f"the controller does not answer ({error}); states are the supervisor's, from {run.record_file}")
    supervised = record.supervised()
    states = {each.name: _state(each, members, supervised) for each in record.processes}
    below = {
        each.name: _below(each.url)
        for each in record.processes
        if each.kind == "instance" and each.role != "prefill" and states[each.name] == "ready"
    }
    return Status(record, states, tuple(remarks), {name: found for name, found in below.items() if found})


def _below(url: str) -> dict[str, int]:
    """What an instance has learnt (connector/choice.py); empty where it does not say."""
    try:
        code, body = ask.get(f"{url}/metrics", Deadline.after(METRICS_S, "launcher.status.METRICS_S"))
    except (PeerGone, Corrupt):
        return {}
    found = re.findall(
        rb'^vllm:fleet_recompute_below_tokens\{[^}]*peer="([^"]*)"[^}]*\} ([0-9.e+]+)$', body, re.MULTILINE
    )
    return {peer.decode(): int(float(tokens)) for peer, tokens in found} if code == 200 else {}


def _members(run: RunDir, record: FleetRecord) -> dict[str, str]:
    client = ControlClient(record.urls("controller"), bearer(read_token(run.token_file)))
    return {member.name: member.state for member in client.snapshot(Deadline.after(CONTROLLER_S, "none")).members}


def _controllers(urls: list[str]) -> dict[str, Any]:
    """``urls`` only where there are several, of which one leads."""
    return {"url": urls[0]} if len(urls) == 1 else {"url": urls[0], "urls": urls}


def _state(each: ProcessRecord, members: dict[str, str], supervised: bool) -> str:
    if each.state not in ("starting", "ready"):
        return each.state
    # On a cluster a process dies with its supervisor, and pids mean nothing here.
    if not supervised if each.node else each.id is None or not alive(each.id):
        return "gone"
    return members.get(each.name, each.state) if each.kind == "instance" else each.state
