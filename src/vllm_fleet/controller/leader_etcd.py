"""The election as keys of an etcd: ``PREFIX/FLEET/leader`` is made by who leads and goes with its lease."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec
from msgspec import Struct

from vllm_fleet.config.etcd import EtcdSettings
from vllm_fleet.controller.leader import Following, Term
from vllm_fleet.controller.stores.etcd import SETTING, root
from vllm_fleet.controller.stores.etcd_client import EtcdClient, EtcdFailed, Pair, created, put, read
from vllm_fleet.core import limits
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.wire.names import Id, Url

WAIT_S = 1.0


class Claim(Struct, frozen=True):
    """What the leader's key says. ``id``: of the process. ``place``: the network its URL is one of."""

    url: Url
    id: Id
    place: str = ""


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Claim).decode


class EtcdElection:
    """See leader.Election. ``url``: where this controller answers; it must listen there already."""

    def __init__(self, settings: EtcdSettings, fleet: str, url: str, process: str) -> None:
        self._client = EtcdClient(settings)
        self._key = f"{root(settings.prefix, fleet)}leader".encode()
        self._claim = Claim(url, process, place())
        self._lease_s = settings.lease_s

    def leader(self) -> str:
        """The URL of who leads now, empty where nobody does. Raises Busy or Corrupt, saying why no etcd tells."""
        held = self._client.get(self._key, self._deadline())
        return "" if held is None else _following(held).leader

    def campaign(self) -> Term | Following:
        held = self._client.get(self._key, self._deadline())
        if held is not None:
            claim = _claim(held)
            if claim is None or not self._is_my_former_self(claim):
                return _following(held)
            self._client.revoke(held.lease, self._deadline())
        lease, ttl_s = self._client.grant(self._lease_s, self._deadline())
        mine = _encode(self._claim)
        _, found = self._client.txn(
            [created(self._key, 0)], [put(self._key, mine, lease), read(self._key)], [read(self._key)], self._deadline()
        )
        now = found[0] if found else None
        if now is None or now.lease != lease:
            with contextlib.suppress(EtcdFailed):  # it ends by itself
                self._client.revoke(lease, self._deadline())
            return Following("", 0) if now is None else _following(now)
        return Term(self._key, now.created, lease, ttl_s)

    def renew(self, term: Term) -> float | None:
        ttl_s = self._client.keep_alive(term.lease, self._deadline())
        held = self._client.get(self._key, self._deadline())
        if held is None or held.created != term.revision:  # somebody deleted the key by hand, say
            return None
        return ttl_s or None

    def wait(self, seen: Following) -> None:
        self._client.wait_change(self._key, seen.seen, Deadline.after(WAIT_S, "leader_etcd.WAIT_S"))

    def resign(self, term: Term) -> None:
        self._client.revoke(term.lease, self._deadline())

    def close(self) -> None:
        self._client.close()

    def _is_my_former_self(self, claim: Claim) -> bool:
        """Whether who leads is dead for certain: its address is the one at which this process listens now. Without this
        a controller that is started again waits for its own lease.
        """
        mine = self._claim
        return claim.id != mine.id and claim.place == mine.place != "" and claim.url == mine.url

    def _deadline(self) -> Deadline:
        return Deadline.after(limits.ETCD_CALL_S, SETTING)


def place() -> str:
    """This boot of this machine and this network namespace: within one, an address and port belong to one process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/net')}"
    except OSError:
        return ""


def _claim(held: Pair) -> Claim | None:
    try:
        return _decode(held.value)
    except (ValueError, RecursionError):
        return None


def _following(held: Pair) -> Following:
    claim = _claim(held)
    return Following("" if claim is None else claim.url, held.modified)
