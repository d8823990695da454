"""One request's timeline: what the router knows of it, joined with what the instances' workers know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import msgspec

from vllm_fleet.config.connector import bearer, read_token
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import BadRequest, Corrupt, FleetError
from vllm_fleet.fabric.endpoint import ask as ask_worker
from vllm_fleet.launcher import ask
from vllm_fleet.launcher.down import not_running
from vllm_fleet.launcher.record import read_record
from vllm_fleet.launcher.rundir import RunDir
from vllm_fleet.net.channel import Credentials, connect
from vllm_fleet.net.control_client import ControlClient
from vllm_fleet.wire import fabric as wire
from vllm_fleet.wire.handoff import TraceRecord
from vllm_fleet.wire.ticket import WorkerAddress

TRACE_S = 5.0
TRACE_SETTING = "launcher.trace.TRACE_S"


class RouterPart(msgspec.Struct, frozen=True):
    """What the router said (router/timeline.py); times in seconds since it received the request."""

    id: str
    route: str
    seconds: dict[str, float]
    prefill: str | None = None
    decode: str | None = None
    mode: str | None = None
    outcome: str | None = None
    status: int | None = None
    tenant: str = ""
    inner_id: str = ""
    """Its id at instances."""
    retries: int = 0
    resumes: int = 0


@dataclass(frozen=True)
class Trace:
    """One request."""

    router: RouterPart
    workers: dict[str, list[TraceRecord]]
    """By instance; what its first worker did for the request."""
    remarks: tuple[str, ...]
    """Whom nothing could be learnt from, and why."""

    def to_json(self) -> dict[str, Any]:
        """What ``trace --json`` prints."""
        made: dict[str, Any] = msgspec.to_builtins(self.router)
        made["workers"] = {name: msgspec.to_builtins(records) for name, records in self.workers.items()}
        made["remarks"] = list(self.remarks)
        return made


def trace(run: RunDir, request_id: str) -> Trace:
    """The timeline of a request of the fleet in this run folder.

    Raises:
        BadRequest: the router does not know it. FleetError: no such fleet runs, or its router does not answer.
    """
    record = read_record(run)
    if record is None:
        raise not_running(run)
    deadline = Deadline.after(TRACE_S, TRACE_SETTING)
    token = read_token(run.token_file)
    authorized = {"Authorization": f"Bearer {bearer(token)}"}
    code, body = ask.get(f"{record.admin_url()}/fleet/v1/requests/{quote(request_id, safe='')}", deadline, authorized)
    if code == 404:
        raise BadRequest(f"the router knows no request {request_id!r}; it remembers the last ones only (x-request-id)")
    if code != 200:
        raise Corrupt(f"the router answered {code}")
    router = msgspec.json.decode(body, type=RouterPart)
    workers: dict[str, list[TraceRecord]] = {}
    remarks: list[str] = []
    try:
        snapshot = ControlClient(record.urls("controller"), bearer(token)).snapshot(deadline)
        members = {member.name: member for member in snapshot.members}
    except FleetError as error:
        return Trace(router, {}, (f"the controller does not answer: {error}",))
    for name, suffix in ((router.prefill, "-p"), (router.decode, "")):
        member = members.get(name or "")
        if member is None or not member.workers:
            if name is not None:
                remarks.append(f"{name} cannot be asked: it is gone, or its connector keeps no traces")
            continue
        try:
            workers[member.name] = _records(
                member.workers[0], Credentials(record.fleet, token), (router.inner_id or request_id) + suffix, deadline
            )
        except FleetError as error:
            remarks.append(f"{name} does not answer: {error}")
    return Trace(router, workers, tuple(remarks))


def _records(worker: WorkerAddress, credentials: Credentials, request_id: str, deadline: Deadline) -> list[TraceRecord]:
    channel = connect(worker.host, worker.port, credentials, deadline)
    try:
        prefixes = tuple(f"{kind}-{request_id}-" for kind in ("cmpl", "chatcmpl"))
        answer = ask_worker(channel, wire.Trace(prefixes), deadline)
    finally:
        channel.close()
    if not isinstance(answer, wire.Traced):
        raise Corrupt("it answered something else than traces")
    return list(answer.records)
