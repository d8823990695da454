"""One suite for every place where the controller's journal is kept; the etcd is a real one."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from tests.contract.etcd_server import ETCD, MISSING, EtcdServer, Tls
from tests.contract.store_owners import EmbeddedOwners, EtcdOwners, MemoryOwners, Owners
from vllm_fleet.controller import engine
from vllm_fleet.controller.journal import decode_records, to_records
from vllm_fleet.controller.state import Entry, FleetState, Rules
from vllm_fleet.controller.stores.contract import Store, StoreFailed, StoreLost
from vllm_fleet.controller.stores.etcd_client import EtcdClient, EtcdFailed, Pair
from vllm_fleet.core import limits
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.env import RealEnv
from vllm_fleet.core.errors import ConfigError
from vllm_fleet.wire.control import Change, Member, State

RULES = Rules()


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    if ETCD is None:
        pytest.skip(MISSING)
    server = EtcdServer(tmp_path_factory.mktemp("etcd"))
    yield server
    server.kill()


@pytest.fixture
def elected(etcd: EtcdServer) -> Iterator[EtcdOwners]:
    owners = EtcdOwners(etcd)
    yield owners
    owners.close_all()


@pytest.fixture(params=["embedded", "memory", "etcd"])
def owners(request: pytest.FixtureRequest, tmp_path: Path) -> Owners:
    if request.param == "etcd":
        found: Owners = request.getfixturevalue("elected")
        return found
    return MemoryOwners() if request.param == "memory" else EmbeddedOwners(tmp_path / "state")


def entry(revision: int, name: str = "a", state: State = "ready", *, left: bool = False, pad: int = 0) -> Entry:
    said = {"model": "m"} | {str(number): "x" * 250 for number in range(pad // 256)}
    life = Member(name, "both", f"http://127.0.0.1:{revision}", 7, f"life-{revision}", revision, state, said)
    return Entry(Change(revision, life), left)


ENTRIES = [entry(1), entry(2, "b"), entry(3, "a"), entry(4, "b", "gone", left=True), entry(5, "c")]


def restored(store: Store, fleet: str = "default") -> FleetState:
    return engine.restore(store, RULES, fleet, RealEnv())


def save(store: Store, state: FleetState, *entries: Entry) -> None:
    """As one turn does."""
    store.append(entries)
    for one in entries:
        state.apply(one, 0.0)


def known(state: FleetState) -> object:
    return state.controller, state.revision, state.generation, state.members, state.past


def in_the_end(owners: Owners, store: Store) -> FleetState:
    """What the next owner finds."""
    owners.close(store)
    following = owners.open()
    state = restored(following)
    owners.close(following)
    return state


# Every store -------------------------------------------------------------------------------------------------------


def test_what_was_appended_comes_back_in_order(owners: Owners) -> None:
    store = owners.open()
    state = restored(store)
    assert state.controller != ""
    save(store, state, *ENTRIES[:2])
    for one in ENTRIES[2:]:
        save(store, state, one)
    assert list(decode_records(owners.raw()).records[1:]) == ENTRIES
    again = in_the_end(owners, store)
    assert known(again) == known(state)
    assert again.history == state.history, "watchers resume across a restart"


def test_a_rewritten_journal_holds_the_same_and_goes_on(owners: Owners) -> None:
    store = owners.open()
    state = restored(store)
    save(store, state, *ENTRIES)
    assert store.appended_bytes > 0
    store.rewrite(to_records(state))
    assert store.appended_bytes == 0
    save(store, state, entry(6, "d"))
    store.rewrite(to_records(state))
    save(store, state, entry(7, "e"))
    assert known(in_the_end(owners, store)) == known(state)


def test_an_owner_goes_on_where_the_one_before_stopped(owners: Owners) -> None:
    state = None
    for revision in range(1, 8):
        store = owners.open()
        found = restored(store)
        assert state is None or known(found) == known(state)
        save(store, found, entry(revision, f"n{revision}"))
        state = found
        owners.close(store)


def test_a_failed_append_is_mended_by_a_rewrite(owners: Owners) -> None:
    store = owners.open()
    state = restored(store)
    save(store, state, *ENTRIES)
    with owners.broken():
        with pytest.raises(StoreFailed):
            store.append([entry(6, "lost")])
        with pytest.raises(StoreFailed):
            store.rewrite([*to_records(state), *ENTRIES, *ENTRIES])
    store.rewrite(to_records(state))
    save(store, state, entry(6, "d"))
    assert known(in_the_end(owners, store)) == known(state)


def test_a_thousand_members(owners: Owners) -> None:
    """More than one request of etcd's holds, both as a journal written anew and as one append."""
    store = owners.open()
    state = restored(store)
    members = [entry(revision, f"n{revision}", pad=2500) for revision in range(1, 1001)]
    save(store, state, *members)
    store.rewrite(to_records(state))
    save(store, state, *[entry(1000 + n, f"n{n}", "suspect", pad=2500) for n in range(1, 1001)])
    assert len(owners.raw()) > 8 * limits.ETCD_VALUE_BYTES_MAX
    assert known(in_the_end(owners, store)) == known(state)


def test_the_longest_entry_fits(owners: Owners) -> None:
    store = owners.open()
    state = restored(store)
    save(store, state, entry(1, pad=limits.JOURNAL_RECORD_BYTES_MAX - 4000))
    assert known(in_the_end(owners, store)) == known(state)


def test_two_owners_never_both_write(owners: Owners) -> None:
    first = owners.open()
    state = restored(first)
    save(first, state, ENTRIES[0])
    try:
        second = owners.open()
    except ConfigError:  # it keeps others out; one that can be deposed is then shut out
        if not isinstance(owners, EtcdOwners):
            owners.close(first)
            return
        owners.depose_first()
        second = owners.open()
    found = restored(second)
    assert known(found) == known(state)
    before = owners.raw()
    with pytest.raises(StoreLost):
        first.append([ENTRIES[1]])
    with pytest.raises(StoreLost):
        first.rewrite(to_records(state))
    assert owners.raw() == before
    save(second, found, ENTRIES[1])
    assert known(in_the_end(owners, second)) == known(found)
    first.close()


def test_a_journal_of_another_fleet_is_refused(owners: Owners) -> None:
    store = owners.open()
    restored(store, "one")
    with pytest.raises(ConfigError, match="belongs to fleet 'one', this is fleet 'two'"):
        restored(store, "two")
    owners.close(store)


def test_close_may_be_called_twice(owners: Owners) -> None:
    store = owners.open()
    restored(store)
    store.close()
    store.close()


# Embedded ----------------------------------------------------------------------------------------------------------


def test_a_file_cut_at_every_byte_gives_its_longest_valid_prefix(tmp_path: Path) -> None:
    owners = EmbeddedOwners(tmp_path)
    store = owners.open()
    state = restored(store)
    ends = [len(owners.raw())]
    for one in ENTRIES:
        save(store, state, one)
        ends.append(len(owners.raw()))
    whole = owners.raw()
    owners.close(store)
    for cut in range(len(whole) + 1):
        (tmp_path / "journal").write_bytes(whole[:cut])
        store = owners.open()
        loaded = store.load()
        complete = sum(end <= cut for end in ends) - 1
        assert list(loaded.records[1:]) == ENTRIES[: max(complete, 0)], cut
        assert loaded.dropped_bytes == cut - (ends[complete] if complete >= 0 else 0)
        if cut % 29 == 0:  # and it goes on from there, without giving out a number twice
            found = restored(store)
            assert found.generation >= max(complete, 0) + loaded.dropped_bytes
            save(store, found, entry(found.revision + 1, "next"))
            assert known(in_the_end(owners, store)) == known(found)
        owners.close(store)


# etcd --------------------------------------------------------------------------------------------------------------


class Faulty(EtcdClient):
    """A client whose transactions may be lost on the way there, on the way back, or be kept for later."""

    fault: str = ""
    after = 0

    def __init__(self, owners: EtcdOwners) -> None:
        super().__init__(owners.settings)
        self.kept: list[Callable[[], tuple[bool, tuple[Pair | None, ...]]]] = []
        self.sent = 0

    def txn(
        self, compare: object, success: object, failure: object, deadline: Deadline
    ) -> tuple[bool, tuple[Pair | None, ...]]:
        send = functools.partial(super().txn, compare, success, failure)  # type: ignore[arg-type]
        self.sent += 1
        if not self.fault or self.sent <= self.after:
            return send(deadline)
        fault, self.fault = self.fault, ""
        if fault == "answer":
            send(deadline)
        elif fault == "kept":
            self.kept.append(lambda: send(soon()))
        elif fault == "twice":
            send(deadline)
            return send(deadline)
        raise EtcdFailed("the test lost it")


def soon() -> Deadline:
    return Deadline.after(5.0, "test")


def fault_next(client: Faulty, fault: str, after: int = 0) -> None:
    client.fault, client.sent, client.after = fault, 0, after


@pytest.mark.parametrize("fault", ["request", "answer", "kept", "twice"])
def test_an_append_in_doubt_is_settled_by_a_rewrite(elected: EtcdOwners, fault: str) -> None:
    client = Faulty(elected)
    store = elected.open_with(client)
    state = restored(store)
    save(store, state, ENTRIES[0])
    fault_next(client, fault)
    if fault == "twice":
        save(store, state, ENTRIES[1])
    else:
        with pytest.raises(StoreFailed, match="the test lost it"):
            store.append([ENTRIES[1]])
    store.rewrite(to_records(state))
    save(store, state, ENTRIES[2])
    before = elected.raw()
    for late in client.kept:
        assert late()[0] is False, "etcd took an append that a rewrite has overtaken"
    assert elected.raw() == before
    assert known(in_the_end(elected, store)) == known(state)


@pytest.mark.parametrize("fault", ["request", "answer", "kept", "twice"])
@pytest.mark.parametrize("after", range(4))
def test_a_rewrite_that_fails_anywhere_leaves_the_old_journal_or_the_new(
    elected: EtcdOwners, fault: str, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "ETCD_VALUE_BYTES_MAX", 3000)
    client = Faulty(elected)
    store = elected.open_with(client)
    state = restored(store)
    save(store, state, *[entry(n, f"n{n}", pad=1000) for n in range(1, 8)])
    old, new = decode_records(elected.raw()).records, tuple(to_records(state))
    assert old != new
    fault_next(client, fault, after)
    try:
        store.rewrite(to_records(state))
        assert fault == "twice"
    except StoreFailed:
        assert decode_records(elected.raw()).records in (old, new)
    assert client.fault == "", "the fault did not happen: the rewrite has fewer steps"
    store.rewrite(to_records(state))
    save(store, state, entry(8, "n8"))
    before = elected.raw()
    for late in client.kept:
        late()
    assert elected.raw() == before
    assert known(in_the_end(elected, store)) == known(state)


def test_a_write_that_was_under_way_when_the_lease_ended_never_arrives(elected: EtcdOwners) -> None:
    client = Faulty(elected)
    store = elected.open_with(client)
    state = restored(store)
    save(store, state, ENTRIES[0])
    for fault in ("append", "rewrite"):
        fault_next(client, "kept", 0 if fault == "append" else 1)
        with pytest.raises(StoreFailed):
            store.append([ENTRIES[1]]) if fault == "append" else store.rewrite(to_records(state))
    assert len(client.kept) == 2
    elected.depose()
    second = elected.open()
    found = restored(second)
    before = elected.raw()
    for late in client.kept:
        assert late()[0] is False
    assert elected.raw() == before
    save(second, found, ENTRIES[2])
    assert known(in_the_end(elected, second)) == known(found)


def test_rewrites_leave_nothing_behind(elected: EtcdOwners) -> None:
    store = elected.open()
    state = restored(store)
    for one in ENTRIES:
        save(store, state, one)
        store.rewrite(to_records(state))
    client = EtcdClient(elected.settings)
    first = f"{elected.settings.prefix}/".encode()
    keys = [pair.key for page in client.pages(first, first[:-1] + b"0", 2.0, "test") for pair in page]
    client.close()
    assert [key.rsplit(b"/", 1)[-1] for key in keys] == [b"head", b"0" * 16, b"leader"]


def test_an_etcd_that_answers_nobody_is_a_failure_not_an_empty_journal(elected: EtcdOwners) -> None:
    store = elected.open()
    state = restored(store)
    save(store, state, *ENTRIES)
    with elected.broken(), pytest.raises(StoreFailed, match="Connection refused"):
        store.load()
    assert known(restored(store)) == known(state)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="not run: openssl is not installed")
def test_an_etcd_behind_tls_that_asks_for_a_certificate(etcd: EtcdServer, tmp_path: Path) -> None:
    tls = Tls(tmp_path / "tls")
    server = EtcdServer(tmp_path / "etcd", tls)
    owners = EtcdOwners(server)
    try:
        files = tls.settings()
        owners.settings = msgspec.structs.replace(owners.settings, **files)
        store = owners.open()
        state = restored(store)
        save(store, state, *ENTRIES)
        assert known(in_the_end(owners, store)) == known(state)
        for without, said in (({"ca_file": None}, "verify failed"), ({"cert_file": None, "key_file": None}, "EOF")):
            client = EtcdClient(msgspec.structs.replace(owners.settings, **without))
            with pytest.raises(EtcdFailed, match=said):
                client.get(b"x", soon())
            client.close()
    finally:
        owners.close_all()
        server.kill()
