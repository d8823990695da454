"""FleetConnector: the class vLLM loads (kv_connector_module_path "vllm_fleet.connector"). Thin: the halves decide."""

from __future__ import annotations

import contextlib
import hashlib
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from vllm_fleet.config.connector import bearer, parse_connector_settings, read_token
from vllm_fleet.connector.agent import Agent
from vllm_fleet.connector.meta import StepMetadata, WorkerHandshake
from vllm_fleet.connector.scheduler import SchedulerSide
from vllm_fleet.connector.split import Ranks
from vllm_fleet.connector.stats import FleetMetrics, FleetStats
from vllm_fleet.connector.versions import cpu_block_packing, vllm_version
from vllm_fleet.connector.worker import WorkerSide
from vllm_fleet.core import log
from vllm_fleet.core.env import RealEnv
from vllm_fleet.core.errors import ConfigError
from vllm_fleet.net.channel import Credentials
from vllm_fleet.wire.ticket import WorkerAddress


def kv_heads(config: VllmConfig) -> int:
    """KV heads of the whole model; latent attention has one, which every rank holds."""
    return 1 if config.model_config.use_mla else int(config.model_config.get_total_num_kv_heads())


def layout_of(config: VllmConfig) -> dict[str, str]:
    """What must be equal on two instances for their KV blocks to mean the same."""
    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    head_size = model.get_head_size()
    shape = model.hf_text_config.to_json_string(use_diff=False).encode()
    return {
        "model": str(model.model)[-200:],
        "model_config": hashlib.sha256(shape).hexdigest()[:16],
        "dtype": str(model.dtype),
        "kv_dtype": str(cache.cache_dtype),
        "block_tokens": str(cache.block_size),
        "head_size": str(head_size),
        "kv_heads": str(kv_heads(config)),
        "tensor_parallel": str(parallel.tensor_parallel_size),
        "packing": cpu_block_packing(config, head_size),
        "vllm": vllm_version(),
    }


class FleetConnector(KVConnectorBase_V1):
    """Hands finished prefills over to other instances, and takes them over from others."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        log.setup()
        transfer = vllm_config.kv_transfer_config
        assert transfer is not None
        settings = parse_connector_settings(dict(transfer.kv_connector_extra_config or {}))
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ConfigError("the fleet connector does not support pipeline parallelism yet; use tensor parallelism")
        if vllm_config.model_config.enable_sleep_mode and vllm_config.device_config.device_type != "cpu":
            raise ConfigError(
                "the fleet connector cannot follow KV memory that sleep mode unmaps, of which vLLM tells nothing; "
                "start without --enable-sleep-mode"
            )
        self._credentials = Credentials(settings.fleet, read_token(settings.token_file))
        self._layout = layout_of(vllm_config)
        self._blocks = kv_cache_config.num_blocks
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._agent: Agent | None = None
        engine = str(transfer.engine_id)
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerSide(
                token=self._credentials.token,
                engine=engine,
                block_tokens=vllm_config.cache_config.block_size,
                env=RealEnv(),
                quicker=settings.load == "quicker",
            )
            parallel = vllm_config.parallel_config
            # Of data-parallel engines behind one URL one registers; which of them gets a request cannot be told
            self._one_engine = parallel.data_parallel_size == 1
            if settings.controller is not None and settings.url is not None and parallel.data_parallel_rank == 0:
                load = self._scheduler.load if self._one_engine else None  # each engine knows its own only
                self._agent = Agent(settings, bearer(self._credentials.token), engine, self._layout, load)
        else:
            self._worker = WorkerSide(
                settings,
                self._credentials,
                engine=engine,
                rank=get_tensor_model_parallel_rank(),
                ranks=Ranks(
                    vllm_config.parallel_config.tensor_parallel_size,
                    kv_heads(vllm_config),
                    vllm_config.cache_config.block_size,
                ),
            )

    @property
    def _s(self) -> SchedulerSide:
        assert self._scheduler is not None, "called on the worker side"
        return self._scheduler

    @property
    def _w(self) -> WorkerSide:
        assert self._worker is not None, "called on the scheduler side"
        return self._worker

    # Worker side ----------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._w.register(kv_caches, self._blocks, self._layout)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return self._w.handshake()

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, StepMetadata)
        self._w.start(connector_metadata)  # here, not in start_load_kv: vLLM 0.32 calls that after the forward pass

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing: loads were started when the step's metadata arrived."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: a request is only computed once its load has ended."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: decode reads the blocks themselves."""

    def wait_for_save(self) -> None:
        """Nothing: see save_kv_layer."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        step = self._connector_metadata
        assert isinstance(step, StepMetadata)
        return self._w.finish(step)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._w.take_invalid()

    # Scheduler side -------------------------------------------------------------------------------------------------

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        addresses = []
        for rank in sorted(metadata):
            worker = metadata[rank]
            assert isinstance(worker, WorkerHandshake)
            addresses.append(WorkerAddress(worker.host, worker.port))
        self._s.workers = tuple(addresses)
        if self._agent is not None:
            self._agent.start(self._s.workers if self._one_engine else ())

    def on_new_request(self, request: Request) -> None:
        self._s.on_new_request(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._s.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        self._s.on_allocated(request, list(blocks.get_block_ids()[0]), num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return self._s.take_step(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        self._s.on_output(connector_output)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self._s.on_finished(request, block_ids)

    def has_pending_push_work(self) -> bool:
        return self._s.has_jobs

    # Both -----------------------------------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> FleetStats | None:
        if self._worker is not None:
            return self._worker.take_stats()
        outcomes = self._s.take_outcomes()
        if not outcomes:
            return None
        stats = FleetStats()
        stats.data["outcomes"] = outcomes
        stats.data["below"] = self._s.thresholds()
        return stats

    def shutdown(self) -> None:
        if self._agent is not None:
            self._agent.stop()
        if self._worker is not None:
            self._worker.close()

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """Blocks whose bytes are contiguous; not for MLA, whose only layout already is."""
        return None if vllm_config.model_config.use_mla else "HND"

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> FleetStats:
        return FleetStats(data=data) if data else FleetStats()

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> FleetMetrics:
        return FleetMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


# vLLM's MultiConnector looks the classes of its children's counters up by registered name, module path or not, and its
# API server dies of one it does not find. Every process that uses this class imports this module.
with contextlib.suppress(ValueError):  # registered already
    KVConnectorFactory.register_connector("FleetConnector", "vllm_fleet.connector", "FleetConnector")
