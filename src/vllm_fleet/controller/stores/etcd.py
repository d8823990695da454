"""The journal as keys of an etcd, for controllers of which one leads.

    PREFIX/FLEET/leader              who leads: gone with its lease
    PREFIX/FLEET/head                the folder of the journal
    PREFIX/FLEET/journal/FOLDER/N    the journal's bytes, in pieces

Each write is a transaction on the condition that the leader's key is still the one this store was opened under, so etcd
itself refuses a leader that lost its lease, however late the write arrives. A rewrite fills a folder that nobody else
ever names, then one transaction turns ``head`` to it and deletes all others.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence

from vllm_fleet.controller.journal import Loaded, Record, decode_records, encode_records
from vllm_fleet.controller.leader import Term
from vllm_fleet.controller.state import Entry
from vllm_fleet.controller.stores.contract import StoreFailed, StoreLost
from vllm_fleet.controller.stores.etcd_client import (
    EtcdClient,
    EtcdFailed,
    Op,
    Pair,
    created,
    delete,
    modified,
    put,
    read,
)
from vllm_fleet.core import limits
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import Corrupt

SETTING = "limits.ETCD_CALL_S"


def root(prefix: str, fleet: str) -> str:
    """Where the keys of one fleet begin. A fleet's name holds no slash."""
    return f"{prefix.rstrip('/')}/{fleet}/"


class EtcdStore:
    """See contract.Store. Opened by the leader of ``term``; a later term shuts it out."""

    def __init__(self, client: EtcdClient, prefix: str, fleet: str, term: Term) -> None:
        """``client`` is this store's own and closed with it."""
        self._client, self._term = client, term
        self._root = root(prefix, fleet).encode()
        self._head_key = self._root + b"head"
        self._head_modified = 0
        self._folder = b""
        self._pieces = 0
        self._appended_bytes = 0

    @property
    def appended_bytes(self) -> int:
        return self._appended_bytes

    def load(self) -> Loaded:
        pieces = self.pieces()
        self._pieces = _number(pieces[-1].key) + 1 if pieces else 0
        return decode_records(b"".join(piece.value for piece in pieces))

    def pieces(self) -> list[Pair]:
        """The journal's bytes as they lie there. Raises StoreFailed."""
        try:
            head = self._client.get(self._head_key, self._deadline())
            if head is None:
                return []
            self._head_modified, self._folder = head.modified, self._root + b"journal/" + head.value + b"/"
            pages = self._client.pages(self._folder, _end(self._folder), limits.ETCD_CALL_S, SETTING)
            return [piece for page in pages for piece in page]
        except (EtcdFailed, Corrupt) as error:
            raise StoreFailed(str(error)) from error

    def append(self, entries: Sequence[Entry]) -> None:
        current = modified(self._head_key, self._head_modified)
        for piece in _pieces(entries):
            self._write_piece(self._folder, self._pieces, piece, current)
            self._pieces += 1
            self._appended_bytes += len(piece)

    def rewrite(self, records: Sequence[Record]) -> None:
        name = f"{self._term.revision:016x}-{secrets.token_hex(8)}".encode()
        folder = self._root + b"journal/" + name + b"/"
        try:
            head = self._client.get(self._head_key, self._deadline())  # an earlier try may have turned it after all
        except (EtcdFailed, Corrupt) as error:
            raise StoreFailed(str(error)) from error
        before = 0 if head is None else head.modified
        count = 0
        for count, piece in enumerate(_pieces(records), 1):
            self._write_piece(folder, count - 1, piece)
        everything = self._root + b"journal/"
        turn = [
            put(self._head_key, name),
            delete(everything, folder),
            delete(_end(folder), _end(everything)),
        ]
        self._head_modified = self._write([modified(self._head_key, before)], turn, self._head_key, name)
        self._folder, self._pieces, self._appended_bytes = folder, count, 0

    def close(self) -> None:
        self._client.close()

    def _write_piece(self, folder: bytes, number: int, piece: bytes, *conditions: Op) -> None:
        key = folder + b"%016x" % number
        self._write([created(key, 0), *conditions], [put(key, piece)], key, piece)

    def _write(self, conditions: Sequence[Op], writes: Sequence[Op], key: bytes, value: bytes) -> int:
        """Do ``writes`` in one step if this term still leads; the revision at which ``key`` then got ``value``.

        No other try writes the same value to the same key: where it is found, an earlier copy of this request arrived.
        """
        leads = created(self._term.key, self._term.revision)
        try:
            _, found = self._client.txn(
                [leads, *conditions], [*writes, read(self._term.key), read(key)],
                [read(self._term.key), read(key)], self._deadline(),
            )  # fmt: skip
        except (EtcdFailed, Corrupt) as error:
            raise StoreFailed(str(error)) from error
        leader, written = found
        if written is not None and written.value == value:
            return written.modified
        if leader is None or leader.created != self._term.revision:
            raise StoreLost(f"etcd refused a write: {self._term.key.decode()} is not this controller's any more")
        raise StoreFailed(f"etcd refused a write: somebody else changes keys under {self._root.decode()}")

    def _deadline(self) -> Deadline:
        return Deadline.after(limits.ETCD_CALL_S, SETTING)


def _pieces(records: Sequence[Record]) -> Iterator[bytes]:
    """The bytes of ``records``, cut between records so that each piece fits one of etcd's requests."""
    piece = bytearray()
    for record in records:
        framed = encode_records([record])
        if piece and len(piece) + len(framed) > limits.ETCD_VALUE_BYTES_MAX:
            yield bytes(piece)
            piece.clear()
        piece += framed
    if piece:
        yield bytes(piece)


def _number(key: bytes) -> int:
    return int(key.rpartition(b"/")[2], 16)


def _end(folder: bytes) -> bytes:
    """The first key behind all that begin with ``folder``, which ends in a slash."""
    return folder[:-1] + b"0"
