"""Decode's half of a worker: the prefill workers it loads KV from, and the loads that have ended."""

from __future__ import annotations

import threading

from vllm_fleet.connector.peer import Ended, Job, Peer, PeerLoad, Self
from vllm_fleet.core import limits
from vllm_fleet.wire.ticket import WorkerAddress


class Loader:
    """All peers of one decode worker, and the ended loads that the engine has not taken yet."""

    def __init__(self, own: Self, changed: threading.Condition, *, load_s: float) -> None:
        self._own = own
        self._changed = changed
        self._load_s = load_s
        self._peers: dict[WorkerAddress, Peer] = {}
        self._jobs: dict[str, Job] = {}
        self._results: list[Ended] = []

    def load(self, load: PeerLoad, address: WorkerAddress) -> None:
        """Start a load; it ends in one Ended."""
        self._jobs[load.request] = self._peer(address).load(load)

    def release(self, transfer: str, address: WorkerAddress) -> None:
        """Give a transfer up."""
        self._peer(address).release(transfer)

    def cancel(self, request: str) -> None:
        """Abandon a request's load; it still ends in one Ended, once nothing writes any more."""
        job = self._jobs.get(request)
        if job is not None:
            job.cancel()

    def fail(self, load: PeerLoad, error: str, reason: str) -> None:
        """A load that cannot even be started."""
        self._report(Ended(load, error, reason, "none", 0, 0.0, 0.0))

    def take_ended(self) -> list[Ended]:
        """Loads that ended since the last call."""
        with self._changed:
            results, self._results = self._results, []
        for result in results:
            self._jobs.pop(result.load.request, None)
        return results

    @property
    def pending(self) -> int:
        """Loads started and not taken yet."""
        return len(self._jobs)

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
            while len(self._peers) >= limits.PEERS_MAX:  # the oldest goes; its thread ends after its queue
                self._peers.pop(next(iter(self._peers))).close()
            peer = self._peers[address] = Peer(address, self._own, self._report, self._load_s)
        return peer

    def _report(self, ended: Ended) -> None:
        with self._changed:
            self._results.append(ended)
            self._changed.notify_all()
