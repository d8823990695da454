"""Owners of a journal, one kind for each store: what a test needs to open, break, heal and take over."""

from __future__ import annotations

import contextlib
import resource
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from tests.contract.etcd_server import EtcdServer
from vllm_fleet.config.etcd import EtcdSettings
from vllm_fleet.controller.leader import Term
from vllm_fleet.controller.leader_etcd import EtcdElection
from vllm_fleet.controller.stores.contract import Store
from vllm_fleet.controller.stores.embedded import EmbeddedStore
from vllm_fleet.controller.stores.etcd import EtcdStore
from vllm_fleet.controller.stores.etcd_client import EtcdClient
from vllm_fleet.controller.stores.memory import MemoryDisk, MemoryStore
from vllm_fleet.core.errors import ConfigError


class Owners(Protocol):
    """One journal, and who opens it one after the other."""

    def open(self) -> Store:
        """As the next owner; ConfigError while the one before keeps others out."""
        ...

    def close(self, store: Store) -> None:
        """Close it in order."""
        ...

    def broken(self) -> contextlib.AbstractContextManager[None]:
        """Inside, nothing can be saved; that the fault happened is proved by StoreFailed alone."""
        ...

    def raw(self) -> bytes:
        """The journal's bytes as they lie there, whoever owns it."""
        ...


class EmbeddedOwners:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self) -> Store:
        return EmbeddedStore(self.folder)

    def close(self, store: Store) -> None:
        store.close()

    def raw(self) -> bytes:
        return (self.folder / "journal").read_bytes()

    @contextlib.contextmanager
    def broken(self) -> Iterator[None]:
        """No file may grow: the kernel refuses, as it would on a full disk."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(self.raw()), before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


class MemoryOwners:
    def __init__(self) -> None:
        self.disk = MemoryDisk()

    def open(self) -> Store:
        return MemoryStore(self.disk)

    def close(self, store: Store) -> None:
        store.close()

    def raw(self) -> bytes:
        return self.disk.journal

    @contextlib.contextmanager
    def broken(self) -> Iterator[None]:
        self.disk.full = True
        yield
        self.disk.full = False


def journal_of(settings: EtcdSettings, fleet: str) -> bytes:
    """The bytes of a fleet's journal in an etcd, read by somebody who leads nothing."""
    client = EtcdClient(settings)
    try:
        nobody = Term(b"nobody", 1, 0, 60)
        return b"".join(piece.value for piece in EtcdStore(client, settings.prefix, fleet, nobody).pieces())
    finally:
        client.close()


class EtcdOwners:
    """Each owner is a leader of its own; the fleet's keys have a prefix of their own."""

    def __init__(self, server: EtcdServer) -> None:
        self.server = server
        self.settings = EtcdSettings((server.url,), prefix=f"/test/{secrets.token_hex(8)}", lease_s=60)
        self.terms: list[Term] = []
        self._elections: list[EtcdElection] = []
        self._stores: list[Store] = []

    def lead(self) -> Term:
        """Win the election as somebody new; ConfigError when somebody leads."""
        name = secrets.token_hex(8)
        election = EtcdElection(self.settings, "default", f"http://{name}:1", name)
        self._elections.append(election)
        outcome = election.campaign()
        if not isinstance(outcome, Term):
            raise ConfigError(f"{outcome.leader} leads")
        self.terms.append(outcome)
        return outcome

    def open(self) -> Store:
        return self.open_with(EtcdClient(self.settings))

    def open_with(self, client: EtcdClient) -> EtcdStore:
        try:
            store = EtcdStore(client, self.settings.prefix, "default", self.lead())
        except ConfigError:
            client.close()
            raise
        self._stores.append(store)
        return store

    def depose(self) -> None:
        """The present leader's lease ends, behind its back."""
        self._elections[-1].resign(self.terms[-1])

    def depose_first(self) -> None:
        self._elections[0].resign(self.terms[0])

    def close(self, store: Store) -> None:
        store.close()
        self.depose()

    def close_all(self) -> None:
        for store in self._stores:
            store.close()
        for election in self._elections:
            election.close()

    def raw(self) -> bytes:
        return journal_of(self.settings, "default")

    @contextlib.contextmanager
    def broken(self) -> Iterator[None]:
        self.server.kill()
        try:
            yield
        finally:
            self.server.start()
