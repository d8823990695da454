"""The journal's bytes, and the state they stand for. Sans-IO.

A journal is a sequence of records: length (4 bytes), CRC-32 of the payload (4 bytes), payload (msgpack). It opens
with one Opening, a record for each member and past life at that moment and what the fleet is to be; then each change
is one Entry.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import msgspec
import msgspec.structs
from msgspec import Struct

from vllm_fleet.controller.state import Entry, FleetState, Rules
from vllm_fleet.core import limits
from vllm_fleet.core.errors import ConfigError
from vllm_fleet.wire.control import Change, Desired, Member
from vllm_fleet.wire.names import Count, Id, Name

FORMAT = 1
HEADER = struct.Struct(">II")


class Opening(Struct, frozen=True, tag="opening"):
    """First record: whose journal this is, and the counters at this moment. ``journal`` names the history."""

    journal: Id
    fleet: Name
    revision: Count
    generation: Count
    format: Count = FORMAT


class Kept(Struct, frozen=True, tag="kept"):
    """A member at the moment of the opening."""

    member: Member


class Past(Struct, frozen=True, tag="past"):
    """A life that was a member before the opening."""

    name: Name
    incarnation: Id
    left: bool


class Wanted(Struct, frozen=True, tag="wanted"):
    """What the fleet is to be, before the opening."""

    desired: Desired


Record = Opening | Kept | Past | Wanted | Entry

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Record).decode


class Mark(Struct, frozen=True):
    """How far a journal has come. A store may keep it beside the journal, to notice an older copy put in its place."""

    journal: Id
    revision: Count
    generation: Count

    def after(self, records: Iterable[Record]) -> Mark:
        """The mark once ``records`` are saved as well."""
        journal, revision, generation = self.journal, self.revision, self.generation
        for record in records:
            if isinstance(record, Opening):
                journal, revision, generation = record.journal, record.revision, record.generation
            elif isinstance(record, Entry):
                revision = record.change.revision
                if isinstance(record.change, Change):
                    generation = max(generation, record.change.member.generation)
        return Mark(journal, revision, generation)


NO_MARK = Mark("", 0, 0)


@dataclass(frozen=True)
class Loaded:
    """The longest valid prefix of a journal, and how many bytes behind it are not valid. ``ahead``: how far the journal
    had come, where this is less, or another journal.
    """

    records: tuple[Record, ...] = ()
    dropped_bytes: int = 0
    ahead: Mark | None = None

    def compared(self, mark: Mark) -> Loaded:
        """With ``ahead`` found out from what was noted when the journal was written."""
        found = NO_MARK.after(self.records)
        behind = found.journal != mark.journal or found.revision < mark.revision
        return replace(self, ahead=mark if mark != NO_MARK and behind else None)


def encode_records(records: Iterable[Record]) -> bytes:
    """The bytes of ``records``."""
    framed = bytearray()
    for record in records:
        payload = _encode(record)
        assert len(payload) <= limits.JOURNAL_RECORD_BYTES_MAX, len(payload)
        framed += HEADER.pack(len(payload), zlib.crc32(payload)) + payload
    return bytes(framed)


def decode_records(journal: bytes) -> Loaded:
    """Read a journal that may end in a torn record or be damaged; never raises."""
    records: list[Record] = []
    at = 0
    revision = -1
    while len(journal) - at >= HEADER.size:
        length, checksum = HEADER.unpack_from(journal, at)
        end = at + HEADER.size + length
        if not 0 < length <= limits.JOURNAL_RECORD_BYTES_MAX or end > len(journal):
            break
        payload = journal[at + HEADER.size : end]
        if zlib.crc32(payload) != checksum:
            break
        try:
            record = _decode(payload)
        except (ValueError, RecursionError):
            break
        if isinstance(record, Opening) != (at == 0):  # exactly one, in front
            break
        if isinstance(record, Opening):
            revision = record.revision
        if isinstance(record, Entry):
            if record.change.revision <= revision:
                break
            revision = record.change.revision
        records.append(record)
        at = end
    return Loaded(tuple(records), len(journal) - at)


def to_records(state: FleetState) -> list[Record]:
    """The records a new journal of ``state`` opens with."""
    records: list[Record] = [Opening(state.controller, state.fleet, state.revision, state.generation)]
    records += [Kept(member) for member in state.members.values()]
    records += [Past(name, incarnation, left) for (name, incarnation), left in state.past.items()]
    if state.desired.revision:  # last: a version that does not know it loses nothing else
        records.append(Wanted(state.desired))
    return records


def restore(loaded: Loaded, rules: Rules, fleet: str, now: float, new_journal: str) -> FleetState:
    """The state that a journal stands for; an empty one stands for a new fleet, named ``new_journal``.

    Everybody gets ``lease_s`` to be heard again. When bytes were dropped, both counters skip as many numbers: a record
    is longer than one byte, so no number that the lost part may have given out is given out again. A journal that had
    come further, as its mark says, goes on from there under the name ``new_journal``: it is not the same history, and
    every member gets a new generation.

    Raises:
        ConfigError: the journal is another fleet's, or of a format this version does not know.
    """
    opening = loaded.records[0] if loaded.records else Opening(new_journal, fleet, 0, 0)
    assert isinstance(opening, Opening)
    if opening.fleet != fleet:
        raise ConfigError(f"state_dir: the journal belongs to fleet {opening.fleet!r}, this is fleet {fleet!r}")
    if opening.format != FORMAT:
        raise ConfigError(f"state_dir: the journal has format {opening.format}, this version knows {FORMAT}")
    state = FleetState(
        opening.journal, rules, fleet=fleet, revision=opening.revision, generation=opening.generation, ticked=now
    )
    _replay(state, loaded.records[1:], now)
    if _give_roles(state):
        state.revision += 1
        state.history.clear()
    if loaded.dropped_bytes:
        state.revision += loaded.dropped_bytes
        state.generation += loaded.dropped_bytes
        state.history.clear()
    if loaded.ahead is not None:
        state.revision = max(state.revision, loaded.ahead.revision)
        state.generation = max(state.generation, loaded.ahead.generation)
        state.restart_history(new_journal)
        for name, member in state.members.items():  # what we forgot may have given them larger ones since
            state.generation += 1
            state.members[name] = msgspec.structs.replace(member, generation=state.generation)
    state.grant_restart_grace(now)
    return state


def _give_roles(state: FleetState) -> bool:
    """Whether a member had to be given its slot's role: a crash between what the fleet is to be and the changes that
    follow from it leaves such a journal.
    """
    roles = {slot.name: slot.role for slot in state.desired.instances}
    others = [m for m in state.members.values() if roles.get(m.name, m.role) != m.role]
    for member in others:
        state.members[member.name] = msgspec.structs.replace(member, role=roles[member.name])
    return bool(others)


def _replay(state: FleetState, records: Sequence[Record], now: float) -> None:
    for record in records:
        if isinstance(record, Entry):
            state.apply(record, now)
        elif isinstance(record, Kept):
            state.members[record.member.name] = record.member
            state.generation = max(state.generation, record.member.generation)
        elif isinstance(record, Past):
            state.remember(record.name, record.incarnation, record.left)
        elif isinstance(record, Wanted):
            state.desired = record.desired
