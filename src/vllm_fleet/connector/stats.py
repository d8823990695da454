"""The connector's counters, carried by vLLM from its processes to each instance's /metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from vllm_fleet.connector.intake import Ended

SECONDS_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


@dataclass
class FleetStats(KVConnectorStats):
    """One interval's observations; ``data`` is plain and additive.

    ``outcomes``: {outcome: handoffs}; ``loads``: [[transport, bytes, copy s, wait s, whole s,
    peer, tokens], ...];
    ``failures``: {reason: loads}; ``pins``: {rank: [transfers, blocks of finished requests]} held now;
    ``expired``: pins that ended unused; ``below``: {peer: tokens under which decode computes rather than loads}.
    """

    data: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.data:
            self.reset()

    def reset(self) -> None:
        self.data = {"outcomes": {}, "loads": [], "failures": {}, "pins": {}, "expired": 0, "below": {}}

    def loaded(self, parts: Sequence[Ended], ranks: int) -> None:
        """One request's KV arrived on one of ``ranks`` workers, each of which has as much."""
        nbytes = sum(part.nbytes for part in parts) * ranks
        slowest = max(parts, key=lambda part: part.whole_s)
        copy_s = max(part.copy_s for part in parts)
        tokens = max(part.tokens for part in parts)
        row = [slowest.transport, nbytes, copy_s, slowest.wait_s, slowest.whole_s, parts[0].peer, tokens]
        self.data["loads"].append(row)

    def failed(self, reason: str) -> None:
        """A load failed."""
        self.data["failures"][reason] = self.data["failures"].get(reason, 0) + 1

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for key in ("outcomes", "failures"):
            for name, count in other.data[key].items():
                self.data[key][name] = self.data[key].get(name, 0) + count
        self.data["loads"] += other.data["loads"]
        self.data["pins"].update(other.data["pins"])
        self.data["below"].update(other.data["below"])
        self.data["expired"] += other.data["expired"]
        return self

    def is_empty(self) -> bool:
        return not any(self.data.values())

    def reduce(self) -> dict[str, int | float]:
        loads = self.data["loads"]
        nbytes = sum(load[1] for load in loads)
        seconds = sum(load[2] for load in loads)
        return {
            "Handoffs loaded": self.data["outcomes"].get("loaded", 0),
            "Handoffs recomputed": self.data["outcomes"].get("recomputed", 0),
            "KV loaded (MB)": round(nbytes / 1e6, 3),
            "Copy speed (GB/s)": round(nbytes / seconds / 1e9, 3) if seconds else 0.0,
        }


class FleetMetrics(KVConnectorPromMetrics):
    """FleetStats as Prometheus metrics, in the API server's process."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter, gauge, histogram = metric_types[Counter], metric_types[Gauge], metric_types[Histogram]
        self._handoffs = counter(
            "vllm:fleet_handoffs",
            "Handoffs by how they ended on this instance. Prefill: held. Decode: loaded, local (nothing left to load), "
            "computed (sooner than loading), recomputed, refused (a ticket that does not fit), dropped.",
            [*labelnames, "outcome"],
        )
        self._bytes = counter("vllm:fleet_handoff_bytes", "Bytes of KV loaded.", [*labelnames, "transport"])
        self._copy = histogram(
            "vllm:fleet_handoff_copy_seconds", "Time bytes moved.", [*labelnames, "transport"], buckets=SECONDS_BUCKETS
        )
        self._wait = histogram(
            "vllm:fleet_handoff_wait_seconds",
            "Time from the load's start in the worker until all its KV was ready at prefill.",
            labelnames,
            buckets=SECONDS_BUCKETS,
        )
        self._whole = histogram(
            "vllm:fleet_handoff_load_seconds",
            "Time from the load's start in the worker to its end: connecting, waiting, copying, giving back.",
            [*labelnames, "transport"],
            buckets=SECONDS_BUCKETS,
        )
        self._failures = counter("vllm:fleet_handoff_failures", "Loads that failed.", [*labelnames, "reason"])
        self._pins = gauge("vllm:fleet_pins", "Transfers this instance holds blocks for.", [*labelnames, "rank"])
        self._held = gauge(
            "vllm:fleet_reserved_blocks", "Blocks of finished requests held for decode.", [*labelnames, "rank"]
        )
        self._below = gauge(
            "vllm:fleet_recompute_below_tokens",
            "Prompts with fewer tokens to load are computed here sooner than loaded from that peer.",
            [*labelnames, "peer"],
        )
        self._expired = counter("vllm:fleet_pins_expired", "Holds that ended unused.", labelnames)
        for values in per_engine_labelvalues.values():  # shown from the start: a missing series means no connector
            for outcome in ("held", "loaded", "local", "recomputed", "refused", "dropped", "computed"):
                self._handoffs.labels(*values, outcome)
            self._pins.labels(*values, "0")
            self._expired.labels(*values)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        values = self.per_engine_labelvalues[engine_idx]
        for outcome, count in transfer_stats_data["outcomes"].items():
            self._handoffs.labels(*values, outcome).inc(count)
        for transport, nbytes, copy_s, wait_s, whole_s, _, _ in transfer_stats_data["loads"]:
            self._wait.labels(*values).observe(wait_s)
            self._bytes.labels(*values, transport).inc(nbytes)
            self._copy.labels(*values, transport).observe(copy_s)
            self._whole.labels(*values, transport).observe(whole_s)
        for reason, count in transfer_stats_data["failures"].items():
            self._failures.labels(*values, reason).inc(count)
        for rank, (pins, blocks) in transfer_stats_data["pins"].items():
            self._pins.labels(*values, str(rank)).set(pins)
            self._held.labels(*values, str(rank)).set(blocks)
        for peer, tokens in transfer_stats_data["below"].items():
            self._below.labels(*values, peer).set(tokens)
        self._expired.labels(*values).inc(transfer_stats_data["expired"])
