"""Decode's half of a worker: the prefill workers it loads KV from, and the loads that have ended.

A load is one request's; it has a part for each prefill worker that holds some of its heads, one where both sides have
the same tensor-parallel size, and has ended when all its parts have.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm_fleet.connector.dial import Self
from vllm_fleet.connector.intake import Ended, Job, PeerLoad
from vllm_fleet.connector.peer import Peer
from vllm_fleet.core import limits, log
from vllm_fleet.wire.ticket import WorkerAddress


@dataclass
class _Parts:
    """One request's load."""

    running: dict[WorkerAddress, Job] = field(default_factory=dict)
    left: int = 0
    ended: list[Ended] = field(default_factory=list)


class Loader:
    """All peers of one decode worker, and the ended loads that the engine has not taken yet."""

    def __init__(self, own: Self, changed: threading.Condition, *, load_s: float, prefill_s: float) -> None:
        self._own = own
        self._changed = changed
        self._load_s, self._prefill_s = load_s, prefill_s
        self._peers: dict[WorkerAddress, Peer] = {}
        self._loads: dict[str, _Parts] = {}
        self._results: list[list[Ended]] = []

    def load(self, parts: Sequence[tuple[WorkerAddress, PeerLoad]]) -> None:
        """Start a load; it ends once, with what became of each part."""
        request = parts[0][1].request
        kept = _Parts(left=len(parts))
        with self._changed:  # no part can be reported as ended before all are known
            self._loads[request] = kept
            for address, part in parts:
                kept.running[address] = self._peer(address).load(part)

    def release(self, transfer: str, address: WorkerAddress) -> None:
        """Give a transfer up."""
        self._peer(address).release(transfer)

    def cancel(self, request: str) -> None:
        """Abandon a request's load; it still ends, once nothing writes any more."""
        with self._changed:
            kept = self._loads.get(request)
        for address, job in kept.running.items() if kept is not None else ():
            self._peer(address).cancel(job)

    def fail(self, request: str, blocks: tuple[int, ...], error: str) -> None:
        """A load that cannot even be started."""
        log.warn("handoff.failed", request=request, reason=error)
        with self._changed:
            self._loads[request] = _Parts(left=1)
        self._report(Ended(request, blocks, error, "BadRequest"))

    def take_ended(self) -> list[list[Ended]]:
        """Loads that ended since the last call: the ends of their parts."""
        with self._changed:
            results, self._results = self._results, []
        return results

    @property
    def has_ended(self) -> bool:
        """Whether take_ended would return something; the condition must be held."""
        return bool(self._results)

    def close(self) -> None:
        """Stop every peer's thread."""
        for peer in self._peers.values():
            peer.close()

    def _peer(self, address: WorkerAddress) -> Peer:
        peer = self._peers.get(address)
        if peer is None:
            while len(self._peers) >= limits.PEERS_MAX:  # the oldest goes; its loads are recomputed
                self._peers.pop(next(iter(self._peers))).close()
            made = Peer(address, self._own, self._report, load_s=self._load_s, prefill_s=self._prefill_s)
            peer = self._peers[address] = made
        return peer

    def _report(self, ended: Ended) -> None:
        """A part has ended. When it failed the others are of no use: they are abandoned."""
        abandoned: list[tuple[WorkerAddress, Job]] = []
        with self._changed:
            kept = self._loads.get(ended.request)
            if kept is None:
                return
            kept.ended.append(ended)
            kept.left -= 1
            if kept.left == 0:
                del self._loads[ended.request]
                self._results.append(kept.ended)
                self._changed.notify_all()
            elif ended.error is not None:
                abandoned = [each for each in kept.running.items() if each[1] is not ended.job]
        for address, job in abandoned:
            peer = self._peers.get(address)
            if peer is not None:
                peer.cancel(job)
