"""FleetConfig: one fleet, described. Frozen; unknown keys are refused (see config.load for the messages)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from vllm_fleet.config.front import FrontConfig
from vllm_fleet.config.part import Part as Part
from vllm_fleet.config.policy import RoutingConfig
from vllm_fleet.config.requests import RequestsConfig
from vllm_fleet.core import limits
from vllm_fleet.wire.names import ChecksumMode, FaultKind, TransportName


class RouterConfig(FrontConfig, RequestsConfig, RoutingConfig):
    """The OpenAI-compatible front door."""

    host: str = Field("127.0.0.1", description="address the router listens on; a wildcard is refused")
    port: int = Field(8000, ge=0, le=65535, description="port the router listens on; 0 picks a free one")
    workers: int = Field(
        1,
        ge=1,
        le=limits.ROUTER_WORKERS_MAX,
        description="processes that share the router's port; each balances by the load that it sees itself",
    )
    request_timeout_s: float = Field(600.0, gt=0, description="longest time one request may take, end to end")
    handoff: Literal["streamed", "sequential"] = Field(
        "streamed", description="ask prefill and decode together, where both can, or decode when prefill has answered"
    )


class EtcdConfig(Part):
    """An etcd that keeps the controllers' journal and says which of them leads."""

    endpoints: tuple[str, ...] = Field(
        ("http://127.0.0.1:2379",),
        min_length=1,
        max_length=limits.ETCD_ENDPOINTS_MAX,
        description="URLs of the etcd's members, all of one cluster",
    )
    prefix: str = Field(
        "/vllm-fleet", min_length=1, max_length=limits.URL_LEN_MAX, description="its keys begin with it"
    )
    credentials_file: str | None = Field(
        None, description="absolute path of a file with one line USER:PASSWORD, readable by its owner only"
    )
    ca_file: str | None = Field(None, description="absolute path of the certificates to trust, for https")
    cert_file: str | None = Field(
        None, description="absolute path of the client's certificate, where etcd asks for one"
    )
    key_file: str | None = Field(None, description="absolute path of that certificate's key")
    lease_s: int = Field(3, ge=2, le=60, description="a leader that cannot renew its lease for so long is replaced")


class ControllerConfig(Part):
    """Membership."""

    host: str = Field("127.0.0.1", description="address the controller listens on; a wildcard is refused")
    port: int = Field(0, ge=0, le=65535, description="port the controller listens on; 0 picks a free one")
    heartbeat_s: float = Field(0.5, gt=0, le=60, description="how often an instance says that it lives")
    suspect_s: float = Field(1.5, gt=0, le=600, description="silence after which an instance is taken out of routing")
    lease_s: float = Field(10.0, gt=0, le=3600, description="silence after which an instance is gone")
    store: Literal["embedded", "etcd"] = Field(
        "embedded", description="where the journal is kept: in the run folder, or in an etcd"
    )
    replicas: int = Field(
        1, ge=1, le=limits.CONTROLLERS_MAX, description="controllers, of which one leads; more than one only with etcd"
    )
    etcd: EtcdConfig = EtcdConfig()


class HandoffConfig(Part):
    """KV moving from prefill to decode."""

    lease_s: float = Field(30.0, gt=0, le=3600, description="how long prefill holds KV for a decode that has not come")
    hold_s: float = Field(120.0, gt=0, le=3600, description="how long prefill holds KV for a decode that has come")
    load_s: float = Field(10.0, gt=0, le=600, description="how long decode tries to load before it recomputes")
    prefill_s: float = Field(
        120.0,
        gt=0,
        le=3600,
        description="how long decode waits for prefill to compute a prompt before it does",
    )
    load: Literal["quicker", "always"] = Field(
        "quicker",
        description="whether decode computes a prompt itself where it has learnt that this is sooner than to load",
    )
    on_failure: Literal["recompute", "fail"] = Field("recompute", description="what decode does when KV cannot be had")


ConnectorName = Literal["fleet", "nixl", "mooncake", "offloading", "lmcache"]
"""``fleet`` is ours; the others are vLLM's own (config.upstream)."""


class ConnectorConfig(Part):
    """The KV connector inside every instance; docs/connectors.md."""

    kind: Literal[ConnectorName, "multi"] = Field(
        "fleet", description="fleet is ours; nixl, mooncake, offloading, lmcache are vLLM's own; multi is several"
    )
    inside: tuple[ConnectorName, ...] = Field(
        (), description="for multi: the connectors inside, in the order in which they are asked for KV"
    )
    extra: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="settings of vLLM's own connectors (kv_connector_extra_config); for multi: a mapping for each name",
    )


class FaultsConfig(Part):
    """Faults that the fabric makes on purpose, to rehearse what a fleet does about them. Never where users are."""

    rate: float = Field(0.0, ge=0, le=1, description="share of transfers that fail, drawn at random")
    every: int = Field(0, ge=0, le=10**9, description="one in so many transfers fails; 0: none")
    kinds: tuple[FaultKind, ...] = Field(
        ("cut",),
        min_length=1,
        description="how they fail, in turn: cut, delay, reorder, refuse (no connection), truncate, corrupt;"
        " the last two claim success, so they need fabric.checksums: full",
    )
    delay_s: float = Field(0.1, ge=0, le=3600, description="how long a delayed transfer waits")
    seed: int = Field(0, description="the same seed draws the same transfers")


class FabricConfig(Part):
    """All that moves bytes between workers."""

    host: str = Field("127.0.0.1", description="address workers listen on for each other; a wildcard is refused")
    transports: tuple[TransportName, ...] = Field(
        ("auto",),
        min_length=1,
        description="transports allowed, best first; the first that probes well is used; auto: all that fit",
    )
    checksums: ChecksumMode = Field(
        "sampled", description="which KV that arrives is compared with its owner's: off, sampled or full"
    )
    faults: FaultsConfig = FaultsConfig()


class LauncherConfig(Part):
    """How processes are started and stopped."""

    ready_s: float = Field(300.0, gt=0, description="longest time an instance may take to load")
    stop_s: float = Field(8.0, gt=0, description="longest time a process may take to stop before it is killed")
    drain_s: float = Field(
        60.0, ge=0, le=3600, description="longest time running requests get when an instance or the fleet is to stop"
    )
    restarts_max: int = Field(
        5, ge=0, le=1000, description="deaths of an instance within restart_window_s after which it stays away"
    )
    restart_window_s: float = Field(600.0, gt=0, le=86_400, description="time in which deaths of an instance count")


class ClusterConfig(Part):
    """A running Ray cluster for the instances; docs/ray.md."""

    address: str | None = Field(
        None,
        pattern=r"^(auto|(ray://)?[^\s/:]+:[0-9]{1,5}|(ray://)?\[[0-9a-fA-F:.]+\]:[0-9]{1,5})$",
        description="ray://HOST:PORT, HOST:PORT or auto; none: everything runs on this machine",
    )
    cpus: float = Field(1.0, ge=0, le=4096, description="CPUs that an instance asks of its node")
    resources: dict[str, float] = Field(
        default_factory=dict, description="further resources of Ray that an instance asks of its node"
    )
    prefill_resources: dict[str, float] = Field(
        default_factory=dict, description="further resources that a prefill instance asks for"
    )
    decode_resources: dict[str, float] = Field(
        default_factory=dict, description="further resources that a decode instance asks for"
    )


class FleetConfig(Part):
    """Everything about one fleet."""

    name: str = Field(
        "default", pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=limits.NAME_LEN_MAX, description="name of the fleet"
    )
    model: str = Field(min_length=1, description="folder or Hugging Face name of the model")
    served_model_name: str | None = Field(None, description="the name clients use; the model's own when not given")
    prefill: Annotated[int, Field(ge=0, le=limits.INSTANCES_MAX)] = Field(1, description="prefill instances")
    decode: Annotated[int, Field(ge=0, le=limits.INSTANCES_MAX)] = Field(1, description="decode instances")
    both: Annotated[int, Field(ge=0, le=limits.INSTANCES_MAX)] = Field(0, description="instances that do both")
    vllm_args: tuple[str, ...] = Field((), description="arguments every vLLM server gets")
    prefill_args: tuple[str, ...] = Field(
        (), description="further arguments of prefill instances, such as another TP size"
    )
    decode_args: tuple[str, ...] = Field((), description="further arguments of decode instances")
    env: dict[str, str] = Field(default_factory=dict, description="environment variables every vLLM server gets")
    router: RouterConfig = RouterConfig()
    controller: ControllerConfig = ControllerConfig()
    handoff: HandoffConfig = HandoffConfig()
    connector: ConnectorConfig = ConnectorConfig()
    fabric: FabricConfig = FabricConfig()
    launcher: LauncherConfig = LauncherConfig()
    cluster: ClusterConfig = ClusterConfig()
