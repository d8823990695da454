"""Logs are events: a name from one list and named values. The list below is the manual.

Never log prompts, tokens, secrets or raw bytes of a peer: a decode failure logs a length.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

EVENTS: dict[str, str] = {
    "accept.failed": "a worker could not accept a connection; it goes on listening",
    "access_log.failed": "the access log cannot be written; requests go on, their lines are lost and counted",
    "auth.refused": "somebody did not prove the fleet's token or show a good API key, and got nothing",
    "breaker.opened": "an instance failed too often; the router leaves it alone for a while",
    "checksum.wrong": "bytes of a transfer are not what the owner holds; they are not used",
    "child.draining": "an instance is to stop: it gets no new requests, running ones finish",
    "child.exit": "a child process ended",
    "child.given_up": "an instance died too often; it stays away until somebody asks for a restart",
    "child.restart": "a child process ended; it is started again after a pause",
    "child.start": "a child process was started",
    "child.waits": "an instance cannot start yet: too few GPUs are free",
    "cluster.actor_lost": "the actor that kept a process on a node of the cluster is gone, and the process with it",
    "cluster.placed": "which node of the cluster each instance will be started on",
    "config.port_retry": "a port was taken between choosing and using it; another is tried",
    "controller.bug": "the controller failed on one request or tick in a way it should not; it goes on",
    "controller.reachable": "the controller answers again after it was unreachable",
    "controller.start": "the controller listens",
    "controller.stop": "the controller was told to stop",
    "controller.unreachable": "the controller does not answer; the last known fleet stays in use",
    "desired.changed": "somebody said what the fleet is to be: instances, their roles, their restarts",
    "drain.cut": "an instance did not become idle within launcher.drain_s; it is stopped all the same",
    "file.refused": "a file that was replaced (keys, certificate) cannot be used; what it held before stays in use",
    "file.reread": "a file that was replaced (keys, certificate) is in use from now on",
    "fleet.draining": "the fleet is to stop: no new requests, running ones get launcher.drain_s",
    "follower.slow": "a decode worker did not read how its transfers get on; it was cut off and recomputes",
    "frame.refused": "a peer sent bytes that are no valid frame; its connection was closed",
    "group.ended": "an epoch of a group ended; its members abort and form the next one",
    "group.formed": "every member of a group has joined its communicator",
    "group.opened": "the members of a group were told to join, each with its rank",
    "handoff.expired": "a lease ended before decode took the KV; its blocks are freed",
    "handoff.failed": "decode could not load KV and recomputes the prompt",
    "handoff.no_bytes": "requests were handed off but decode loaded no KV: prefill/decode in name only",
    "handoff.no_params": "a prefill instance answered without kv_transfer_params: is the connector configured there?",
    "handoff.refused": "kv_transfer_params were not signed by this fleet or do not fit; they are ignored",
    "instance.registered": "this instance registered with the controller",
    "journal.failed": "the journal cannot be written: members live in memory only and joins wait",
    "journal.fenced": "etcd refused what this controller wrote: another one has led since, this one stops",
    "journal.older": "the journal ends before what was saved in it: an older copy or a loss; it goes on renamed",
    "journal.saved": "the journal is written again after it failed",
    "journal.truncated": "the journal ended in a torn record, which was dropped",
    "kv_events.failed": "an instance's KV events made no sense or cannot be had; it is tried anew",
    "kv_events.gap": "KV events of an instance were lost for good; its blocks are learnt anew",
    "leader.gained": "this controller leads the fleet now",
    "leader.lost": "this controller does not lead any more: its lease ended, or etcd refused its writes",
    "leader.paused": "etcd did not renew this controller's lease in time: it answers nothing until etcd does",
    "leader.resumed": "etcd answers again and this controller still leads",
    "leader.unsure": "etcd does not answer: who leads is not known, joins wait",
    "link.chosen": "a link to a peer is up; says which transport and why better ones were passed over",
    "link.lost": "a link to a peer broke",
    "member.changed": "a member of the fleet changed its state",
    "member.gone": "a member of the fleet left or its lease ended",
    "record.failed": "fleet.json could not be written; the fleet goes on, other commands see an old state",
    "router.bug": "the router failed on a request; please report it",
    "router.start": "the router listens",
    "router.stop": "the router stops: no new requests, running ones get a short time to end",
    "stream.broken": "an instance died in the middle of a stream that could not be resumed: it ended with an error",
    "stream.resumed": "an instance died in the middle of a stream; another goes on with it",
    "trace.failed": "spans could not be sent to the collector; they are lost and counted",
    "transport.skipped": "a transport cannot be used on this machine; the others are",
    "upstream.failed": "an instance did not answer a request",
    "watcher.slow": "a watcher did not keep up with the changes; it was cut off and may resume",
    "worker.exit": "a process of the router ended by itself; it is started again after a pause",
    "worker.hung": "a process of the router does not answer the others any more; it is killed",
    "worker.start": "a process of the router serves on the shared port",
}

_LOGGER = logging.getLogger("vllm_fleet")


def setup(stream: object = None) -> None:
    """Send this process's events to ``stream`` (default: standard error), a line each."""
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)  # type: ignore[arg-type]
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s"))
    _LOGGER.handlers[:] = [handler]
    _LOGGER.setLevel(logging.INFO)
    _LOGGER.propagate = False


@contextlib.contextmanager
def to_file(file: Path) -> Iterator[None]:
    """Send this process's events to the end of ``file`` for a while."""
    before = _LOGGER.handlers[:], _LOGGER.level, _LOGGER.propagate
    with file.open("a", encoding="utf-8") as stream:
        setup(stream)
        try:
            yield
        finally:
            _LOGGER.handlers[:], _LOGGER.level, _LOGGER.propagate = before


def event(name: str, *, level: int = logging.INFO, **values: object) -> None:
    """Log one event; ``name`` must be in EVENTS."""
    assert name in EVENTS, f"unknown event {name!r}: add it to core/log.py"
    if _LOGGER.isEnabledFor(level):
        text = " ".join(f"{key}={json.dumps(value, default=str)}" for key, value in values.items())
        _LOGGER.log(level, "%s %s", name, text)


def warn(name: str, **values: object) -> None:
    """Log one event that an operator should look at."""
    event(name, level=logging.WARNING, **values)
