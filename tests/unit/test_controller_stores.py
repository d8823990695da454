"""The journal: nothing acknowledged is lost, torn ends are dropped, one owner, full disks are survived."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vllm_fleet.controller import engine
from vllm_fleet.controller.journal import HEADER, Past, decode_records, encode_records, restore, to_records
from vllm_fleet.controller.state import Entry, FleetState, Rules
from vllm_fleet.controller.stores.contract import Store, StoreFailed
from vllm_fleet.controller.stores.embedded import EmbeddedStore
from vllm_fleet.controller.stores.memory import MemoryDisk, MemoryStore
from vllm_fleet.core import limits
from vllm_fleet.core.env import RealEnv
from vllm_fleet.core.errors import ConfigError
from vllm_fleet.wire.control import Change, Member, State

RULES = Rules()


def entry(revision: int, name: str = "a", state: State = "ready", *, left: bool = False) -> Entry:
    life = Member(name, "both", f"http://127.0.0.1:{revision}", 7, f"life-{revision}", revision, state, {"model": "m"})
    return Entry(Change(revision, life), left)


ENTRIES = [entry(1), entry(2, "b"), entry(3, "a"), entry(4, "b", "gone", left=True), entry(5, "c")]


@pytest.fixture(params=["embedded", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    opened: Store = EmbeddedStore(tmp_path / "state") if request.param == "embedded" else MemoryStore()
    yield opened
    opened.close()


def started(store: Store, fleet: str = "default") -> FleetState:
    return engine.restore(store, RULES, fleet, RealEnv())


def saved(store: Store, entries: list[Entry]) -> FleetState:
    state = started(store)
    for one in entries:
        store.append([one])
        state.apply(one, 0.0)
    return state


def known(state: FleetState) -> object:
    return state.controller, state.revision, state.generation, state.members, state.past


# Every store -------------------------------------------------------------------------------------------------------


def test_what_was_saved_comes_back(store: Store) -> None:
    state = saved(store, ENTRIES)
    again = started(store)
    assert known(again) == known(state)
    assert again.history == state.history, "watchers resume across a restart"


def test_rewritten_journal_holds_the_same_state_and_goes_on(store: Store) -> None:
    state = saved(store, ENTRIES)
    assert store.appended_bytes == len(encode_records(ENTRIES))
    store.rewrite(to_records(state))
    assert store.appended_bytes == 0
    store.append([entry(6, "d")])
    state.apply(entry(6, "d"), 0.0)
    assert known(started(store)) == known(state)


def test_new_journal_has_a_name_that_stays(store: Store) -> None:
    assert started(store).controller == started(store).controller != ""


def test_journal_of_another_fleet_is_refused(store: Store) -> None:
    started(store, "one")
    with pytest.raises(ConfigError, match="belongs to fleet 'one', this is fleet 'two'"):
        started(store, "two")


# Bytes -------------------------------------------------------------------------------------------------------------


def test_journal_cut_at_every_byte_keeps_what_was_whole_and_gives_out_no_number_twice() -> None:
    store = MemoryStore()
    saved(store, [])
    opening_len = len(store.disk.journal)
    for one in ENTRIES:
        store.append([one])
    whole = store.disk.journal
    ends = [opening_len + len(encode_records(ENTRIES[:count])) for count in range(len(ENTRIES) + 1)]
    for cut in range(len(whole) + 1):
        loaded = decode_records(whole[:cut])
        expected = sum(end <= cut for end in ends) - 1
        assert list(loaded.records[1:]) == ENTRIES[: max(expected, 0)], cut
        state = restore(loaded, RULES, "default", 0.0, "new")
        assert loaded.dropped_bytes == cut - (ends[expected] if expected >= 0 else 0)
        assert state.generation == max(expected, 0) + loaded.dropped_bytes
        assert state.revision == state.generation
        assert not (loaded.dropped_bytes and state.history)


def test_flipped_bit_ends_the_valid_prefix() -> None:
    whole = encode_records([*to_records(FleetState("j", RULES)), *ENTRIES])
    first = len(encode_records(to_records(FleetState("j", RULES))))
    for at in range(first, len(whole), 3):
        damaged = bytearray(whole)
        damaged[at] ^= 0x10
        loaded = decode_records(bytes(damaged))
        assert list(loaded.records[1:]) == ENTRIES[: len(loaded.records) - 1], at
        assert len(loaded.records) - 1 < len(ENTRIES), at


@pytest.mark.parametrize(
    "tail",
    [b"\0" * 64, b"\xff" * 64, HEADER.pack(2**32 - 1, 0), encode_records([ENTRIES[0]]), encode_records([entry(5)])],
)
def test_tail_that_is_no_continuation_is_dropped(tail: bytes) -> None:
    """Zeros after a power loss, noise, absurd lengths, and revisions that do not go up."""
    whole = encode_records([*to_records(FleetState("j", RULES)), *ENTRIES])
    loaded = decode_records(whole + tail)
    assert (list(loaded.records[1:]), loaded.dropped_bytes) == (ENTRIES, len(tail))


def test_past_lives_survive_a_rewrite() -> None:
    state = FleetState("j", RULES)
    for one in ENTRIES:
        state.apply(one, 0.0)
    assert to_records(state)[-2:] == [Past("a", "life-1", False), Past("b", "life-4", True)]
    loaded = decode_records(encode_records(to_records(state)))
    assert known(restore(loaded, RULES, "default", 0.0, "new")) == known(state)


def test_members_get_a_lease_after_a_restart() -> None:
    state = FleetState("j", RULES)
    state.apply(entry(1), 0.0)
    again = restore(decode_records(encode_records(to_records(state))), RULES, "default", 500.0, "new")
    pulse = again.pulses["a"]
    assert (pulse.suspect_at, pulse.gone_at) == (500.0 + RULES.lease_s, 500.0 + RULES.lease_s)


# Files -------------------------------------------------------------------------------------------------------------


def test_torn_file_is_repaired_at_start(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path)
    saved(store, ENTRIES)
    store.close()
    journal = tmp_path / "journal"
    journal.write_bytes(journal.read_bytes()[:-3])
    store = EmbeddedStore(tmp_path)
    state = started(store)
    store.append([entry(state.revision + 1, "d")])
    store.close()
    store = EmbeddedStore(tmp_path)
    assert set(started(store).members) == {"a", "d"}
    assert store.load().dropped_bytes == 0
    store.close()


def test_second_controller_is_refused_and_told_who_holds_the_folder(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path)
    with pytest.raises(ConfigError, match=rf"used by another controller, process {os.getpid()}"):
        EmbeddedStore(tmp_path)
    store.close()
    store.close()
    EmbeddedStore(tmp_path).close()


def test_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from vllm_fleet.controller.stores.embedded import EmbeddedStore\n"
        "store = EmbeddedStore(Path(sys.argv[1])); print('held', flush=True); time.sleep(30)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"process {holder.pid}"):
            EmbeddedStore(tmp_path)
        holder.kill()
        holder.wait()
    EmbeddedStore(tmp_path).close()


def test_folder_that_cannot_be_made_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="state_dir: cannot use"):
        EmbeddedStore(tmp_path / "file" / "state")


def test_files_are_the_owners_only(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path / "state")
    saved(store, ENTRIES)
    store.close()
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "state").iterdir()}
    assert modes == {"journal": 0o600, "lock": 0o600, "mark": 0o600}
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700


@contextmanager
def files_at_most(nbytes: int) -> Iterator[None]:
    """A disk that is full for files longer than ``nbytes``: the kernel refuses, as it would for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_is_reported_and_loses_nothing_saved(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path)
    state = saved(store, ENTRIES)
    journal_len = (tmp_path / "journal").stat().st_size
    with files_at_most(journal_len + 10):
        with pytest.raises(StoreFailed, match="cannot write"):
            store.append([entry(6, "d")])
        with pytest.raises(StoreFailed, match="cannot write"):
            store.rewrite([*to_records(state), *ENTRIES, *ENTRIES])
    assert (tmp_path / "journal").stat().st_size == journal_len + 10, "the fault happened: a part was written"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["journal", "lock", "mark"]
    assert list(store.load().records[1:]) == ENTRIES
    store.rewrite(to_records(state))
    store.append([entry(6, "d")])
    assert set(started(store).members) == {"a", "c", "d"}
    store.close()


def test_start_with_a_torn_journal_on_a_full_disk_goes_on_in_memory() -> None:
    store = MemoryStore(MemoryDisk())
    before = saved(store, ENTRIES)
    store.disk.journal, store.disk.full = store.disk.journal + encode_records([entry(6, "d")])[:-1], True
    state = started(store)
    assert set(state.members) == {"a", "c"}
    assert not state.durable
    assert state.controller != before.controller, "what is not saved must not look like the saved history"


def test_start_without_a_journal_on_a_full_disk_fails() -> None:
    with pytest.raises(StoreFailed):
        started(MemoryStore(MemoryDisk(full=True)))


def test_the_longest_member_fits_one_record() -> None:
    fingerprint = {str(number): "\x01" * 250 for number in range(limits.CONTROL_BODY_BYTES_MAX // 1600)}
    life = Member("n" * 64, "both", "http://" + "\x01" * 500, 1, "\x01" * 256, 1, "ready", fingerprint)
    assert len(encode_records([Entry(Change(1, life))])) < limits.JOURNAL_RECORD_BYTES_MAX
