"""launcher.plan: whole command lines and environments."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from vllm_fleet.config.fleet import FleetConfig, RouterConfig
from vllm_fleet.config.front import front_settings
from vllm_fleet.config.requests import request_settings
from vllm_fleet.core.errors import ConfigError
from vllm_fleet.launcher import connectors, kv_events
from vllm_fleet.launcher.machine import Machine
from vllm_fleet.launcher.plan import Place, check_vllm_args, option, plan, ranks, served_name, url
from vllm_fleet.launcher.spec import ProcessSpec

PORTS = {"controller": 7000, "router": 8000, "prefill-0": 7001, "decode-0": 7002, "decode-1": 7003, "both-0": 7004}
PLACE = Place("/run/token", "/run/settings", "/run/state", {name: f"/run/tmp/{name}" for name in PORTS})


def machine(*, cpu: bool = True, cores: int = 9, gpus: tuple[str, ...] = (), **environ: str) -> Machine:
    return Machine("/bin/python", cores, cpu, gpus, environ, "/cache")


def config(**changes: Any) -> FleetConfig:
    return FleetConfig.model_validate({"model": "/models/tiny", "decode": 2, "both": 1} | changes)


def specs(made: FleetConfig, on: Machine) -> Mapping[str, ProcessSpec]:
    return {spec.name: spec for spec in plan(made, on, PLACE, PORTS)}


def test_a_whole_fleet_on_a_cpu() -> None:
    made = plan(config(), machine(), PLACE, PORTS)
    assert [(spec.name, spec.kind, spec.role) for spec in made] == [
        ("controller", "controller", "controller"),
        ("router", "router", "router"),
        ("prefill-0", "instance", "prefill"),
        ("decode-0", "instance", "decode"),
        ("decode-1", "instance", "decode"),
        ("both-0", "instance", "both"),
    ]
    assert [spec.health_url for spec in made] == [f"http://127.0.0.1:{PORTS[spec.name]}/health" for spec in made]


def test_controller_and_router() -> None:
    made = specs(config(name="f", controller={"lease_s": 3.0}, router={"request_timeout_s": 60.0}), machine())
    assert made["controller"] == ProcessSpec(
        name="controller",
        kind="controller",
        role="controller",
        argv=("/bin/python", "-m", "vllm_fleet.controller", "--settings", "/run/settings/controller.json"),
        url="http://127.0.0.1:7000",
        env={"PYTHONUNBUFFERED": "1"},
        settings={
            "fleet": "f",
            "host": "127.0.0.1",
            "port": 7000,
            "token_file": "/run/token",
            "state_dir": "/run/state",
            "heartbeat_s": 0.5,
            "suspect_s": 1.5,
            "lease_s": 3.0,
        },
        settings_file="/run/settings/controller.json",
    )
    assert made["router"] == ProcessSpec(
        name="router",
        kind="router",
        role="router",
        argv=("/bin/python", "-m", "vllm_fleet.router", "--settings", "/run/settings/router.json"),
        url="http://127.0.0.1:8000",
        env={"PYTHONUNBUFFERED": "1"},
        settings={
            "fleet": "f",
            "host": "127.0.0.1",
            "port": 8000,
            "token_file": "/run/token",
            "controller": "http://127.0.0.1:7000",
            "request_timeout_s": 60.0,
            "handoff": "streamed",
            "requests": request_settings(RouterConfig()),
            "policy": kv_events.router_settings(config(), ""),
            "stop_s": 60.0,
            "front": front_settings(RouterConfig(), None),
            "workers": 1,
        },
        settings_file="/run/settings/router.json",
    )


def test_an_instance_on_a_cpu() -> None:
    spec = specs(config(vllm_args=("--max-model-len", "512"), env={"A": "b"}), machine())["decode-0"]
    assert spec.argv[:10] == (
        "/bin/python", "-m", "vllm.entrypoints.openai.api_server", "--model", "/models/tiny",
        "--host", "127.0.0.1", "--port", "7002", "--kv-transfer-config",
    )  # fmt: skip
    transfer = json.loads(spec.argv[10])
    assert transfer == {
        "kv_connector": "FleetConnector",
        "kv_connector_module_path": "vllm_fleet.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "fleet": "default",
            "name": "decode-0",
            "role": "decode",
            "token_file": "/run/token",
            "url": "http://127.0.0.1:7002",
            "controller": "http://127.0.0.1:7000",
            "host": "127.0.0.1",
            "transports": ["auto"],
            "checksums": "sampled",
            "faults": None,
            "lease_s": 30.0,
            "hold_s": 120.0,
            "load_s": 10.0,
            "prefill_s": 120.0,
            "load": "quicker",
        },
    }
    assert spec.argv[11:] == (
        "--enable-prompt-tokens-details", "--served-model-name", "tiny", "--enforce-eager", "--max-model-len", "512",
    )  # fmt: skip
    assert spec.env == {
        "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_CACHE_DIR": "/cache/torchinductor",
        "PYTHONHASHSEED": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "2",
        "TMPDIR": "/run/tmp/decode-0",
        "A": "b",
    }
    assert (spec.tmp, spec.settings, spec.settings_file) == ("/run/tmp/decode-0", None, None)


def test_roles_and_failure_policy_reach_vllm() -> None:
    made = specs(config(handoff={"on_failure": "fail"}), machine())
    roles = {}
    for name, spec in made.items():
        if spec.kind == "instance":
            transfer = json.loads(spec.argv[spec.argv.index("--kv-transfer-config") + 1])
            roles[name] = transfer["kv_role"]
            assert transfer["kv_load_failure_policy"] == "fail"
    assert set(roles.values()) == {"kv_both"}, "their roles may change while they run"


def test_what_the_user_set_stays() -> None:
    on = machine(OMP_NUM_THREADS="7", PYTHONHASHSEED="3", TMPDIR="/scratch")
    made = config(env={"VLLM_CPU_KVCACHE_SPACE": "4", "TMPDIR": "/mine"}, vllm_args=("--served_model_name=x",))
    spec = specs(made, on)["both-0"]
    assert "OMP_NUM_THREADS" not in spec.env
    assert "PYTHONHASHSEED" not in spec.env
    assert (spec.env["VLLM_CPU_KVCACHE_SPACE"], spec.env["TMPDIR"]) == ("4", "/mine")
    assert spec.tmp is None, "not ours to remove"
    assert "--served-model-name" not in spec.argv
    assert specs(config(), on)["both-0"].env["TMPDIR"] == "/run/tmp/both-0"


@pytest.mark.parametrize(
    "arg", ["--enforce-eager", "--no-enforce-eager", "-O3", "--compilation-config={}", "-cc.mode=2"]
)
def test_compilation_is_the_users_choice(arg: str) -> None:
    spec = specs(config(vllm_args=(arg,)), machine())["both-0"]
    assert spec.argv.count("--enforce-eager") == (1 if arg == "--enforce-eager" else 0)


def test_a_model_from_hugging_face_is_fetched_under_its_own_name() -> None:
    spec = specs(config(model="org/model"), machine())["both-0"]
    assert "HF_HUB_OFFLINE" not in spec.env
    assert spec.argv[spec.argv.index("--served-model-name") + 1] == "org/model"
    assert served_name(config(served_model_name="s")) == "s"
    assert served_name(config(vllm_args=("--served-model-name", "t"))) == "t"


def test_each_instance_gets_gpus_of_its_own() -> None:
    on = machine(cpu=False, gpus=tuple("01234567"))
    made = specs(config(vllm_args=("-tp", "2")), on)
    assert [spec.env.get("CUDA_VISIBLE_DEVICES") for spec in made.values()] == [None, None, "0,1", "2,3", "4,5", "6,7"]
    assert "--enforce-eager" not in made["both-0"].argv
    assert "VLLM_CPU_KVCACHE_SPACE" not in made["both-0"].env
    shared = specs(config(env={"CUDA_VISIBLE_DEVICES": "3"}), on)
    assert {shared[name].env["CUDA_VISIBLE_DEVICES"] for name in ("prefill-0", "both-0")} == {"3"}
    assert "CUDA_VISIBLE_DEVICES" not in specs(config(), machine(cpu=False))["both-0"].env
    with pytest.raises(
        ConfigError, match=r"^4 instances need 2 \+ 2 \+ 2 \+ 2 = 8 GPUs, this machine offers 3; start fewer, or set"
    ):
        specs(config(vllm_args=("-tp=2",)), machine(cpu=False, gpus=tuple("012")))


def test_ranks() -> None:
    assert ranks(()) == 1
    assert ranks(("--tensor_parallel_size=4", "-pp", "2", "--data-parallel-size", "3")) == 24
    with pytest.raises(ConfigError, match=r"--tensor-parallel-size needs a whole number of at least 1, found 'x'"):
        ranks(("-tp", "x"))
    assert option(("--a", "1", "--a=2"), "--a") == "2"
    assert option(("--a",), "--a") is None


@pytest.mark.parametrize(
    "arg",
    [
        "--port", "--port=1", "--host", "--model", "--mod", "--kv-transfer-config", "--kv_transfer_config",
        "--kv-transfer-config.kv_role", "--kv-transfer", "--uds", "--headless", "--ssl-keyfile=x",
    ],
)  # fmt: skip
def test_what_is_ours_is_refused(arg: str) -> None:
    for setting in ("vllm_args", "prefill_args", "decode_args"):
        with pytest.raises(ConfigError, match=rf"^{setting} must not hold --"):
            check_vllm_args(config(**{setting: ("--max-model-len", "512", arg)}))


def test_what_only_looks_like_ours_is_not_refused() -> None:
    args = ("--model-impl", "auto", "--kv-cache-dtype=auto", "-tp", "2", "--max-model-len", "1", "port", "--")
    check_vllm_args(config(vllm_args=args))


def test_roles_may_differ_in_size() -> None:
    made = config(prefill_args=("-tp", "2"), decode_args=("--max-num-seqs=8",), vllm_args=("--seed=1",), both=0)
    on = machine(cpu=False, gpus=("a", "b", "c", "d"))
    spec = specs(made, on)
    assert [spec[name].env["CUDA_VISIBLE_DEVICES"] for name in ("prefill-0", "decode-0", "decode-1")] == [
        "a,b",
        "c",
        "d",
    ]
    assert spec["prefill-0"].argv[-3:] == ("--seed=1", "-tp", "2")
    assert spec["decode-1"].argv[-2:] == ("--seed=1", "--max-num-seqs=8")


def test_urls() -> None:
    assert url("127.0.0.1", 1) == "http://127.0.0.1:1"
    assert url("::1", 1) == "http://[::1]:1"


# Connectors of vLLM's own ---------------------------------------------------------------------------------------------


def with_connector(kind: str, **changes: Any) -> FleetConfig:
    part = {"kind": kind, "inside": changes.pop("inside", ()), "extra": changes.pop("extra", {})}
    return config(connector=part, **changes)


def side_ports(count: int) -> dict[str, int]:
    """PORTS with ``count`` consecutive ones for each instance."""
    names = [name for name in PORTS if "-" in name]
    return PORTS | {f"{name}/side/{i}": 9000 + 10 * at + i for at, name in enumerate(names) for i in range(count)}


def transfer(spec: ProcessSpec) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(spec.argv[spec.argv.index("--kv-transfer-config") + 1])
    return found


def instances(made: FleetConfig, on: Machine, ports: Mapping[str, int]) -> dict[str, ProcessSpec]:
    return {spec.name: spec for spec in plan(made, on, PLACE, ports) if spec.kind == "instance"}


def connector_env(spec: ProcessSpec) -> dict[str, str]:
    return {name: value for name, value in spec.env.items() if "NIXL" in name or "UCX" in name or "MOONCAKE" in name}


def test_nixl_on_a_cpu() -> None:
    made = instances(with_connector("nixl", handoff={"lease_s": 20.5}), machine(), side_ports(1))
    assert transfer(made["prefill-0"]) == {
        "kv_connector": "NixlConnector",
        "kv_role": "kv_producer",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"kv_lease_duration": 21},
    }
    assert [transfer(spec)["kv_role"] for spec in made.values()] == [
        "kv_producer", "kv_consumer", "kv_consumer", "kv_both",
    ]  # fmt: skip
    assert connector_env(made["decode-1"]) == {
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": "9020",
        "VLLM_NIXL_ABORT_REQUEST_TIMEOUT": "21",
        "UCX_TLS": "self,sm,tcp",
        "UCX_NET_DEVICES": "lo",
    }
    assert {spec.fingerprint == {"connector": "nixl", "model": "/models/tiny"} for spec in made.values()} == {True}


def test_nixl_ports_of_two_instances_never_meet() -> None:
    """NixlConnector listens on base + dp_rank * tp_size + tp_rank."""
    made = with_connector("nixl", vllm_args=("-tp", "2", "-dp", "3"))
    count = connectors.side_ports(made, "prefill", ranks(made.vllm_args))
    assert count == 6
    used: list[int] = []
    for spec in instances(made, machine(cpu=False), side_ports(count)).values():
        base = int(spec.env["VLLM_NIXL_SIDE_CHANNEL_PORT"])
        used += [base + dp_rank * 2 + tp_rank for dp_rank in range(3) for tp_rank in range(2)]
    assert len(used) == len(set(used)) == 24
    assert set(used) <= set(side_ports(count).values())


def test_what_the_user_says_about_nixl_goes_first_but_for_ports() -> None:
    on = machine(UCX_TLS="tcp", VLLM_NIXL_SIDE_CHANNEL_PORT="5600")
    made = with_connector("nixl", extra={"kv_lease_duration": 90, "backends": ["UCX"]}, env={"UCX_NET_DEVICES": "eth0"})
    spec = instances(made, on, side_ports(1))["prefill-0"]
    assert transfer(spec)["kv_connector_extra_config"] == {"kv_lease_duration": 90, "backends": ["UCX"]}
    assert connector_env(spec) == {
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": "9000",
        "VLLM_NIXL_ABORT_REQUEST_TIMEOUT": "30",
        "UCX_NET_DEVICES": "eth0",
    }


def test_nixl_elsewhere_than_on_one_cpu() -> None:
    """UCX finds its own way on GPUs, and is not bound to loopback when the fleet is not."""
    on_gpus = instances(with_connector("nixl"), machine(cpu=False), side_ports(1))["both-0"]
    assert not any(name.startswith("UCX") for name in on_gpus.env)
    apart = with_connector("nixl", fabric={"host": "10.0.0.1"}, handoff={"lease_s": 1.0})
    spec = instances(apart, machine(), side_ports(1))["both-0"]
    assert spec.env["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "10.0.0.1"
    assert (spec.env["UCX_TLS"], spec.env.get("UCX_NET_DEVICES")) == ("self,sm,tcp", None)
    assert transfer(spec)["kv_connector_extra_config"] == {"kv_lease_duration": 6}
    for host, device in (("localhost", "lo"), ("::1", "lo"), ("node-1", None)):
        named = instances(with_connector("nixl", fabric={"host": host}), machine(), side_ports(1))["both-0"]
        assert named.env.get("UCX_NET_DEVICES") == device


def test_mooncake() -> None:
    ports = {name: port for name, port in side_ports(1).items() if not name.startswith("decode-0/")}
    made = instances(with_connector("mooncake", extra={"num_workers": 4}), machine(cpu=False), ports)
    assert transfer(made["prefill-0"]) == {
        "kv_connector": "MooncakeConnector",
        "kv_role": "kv_producer",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"mooncake_protocol": "tcp", "num_workers": 4},
    }
    assert connector_env(made["prefill-0"]) == {
        "VLLM_MOONCAKE_BOOTSTRAP_PORT": "9000",
        "VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT": "30",
    }
    assert connector_env(made["decode-0"]) == {"VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT": "30"}


@pytest.mark.parametrize(
    ("kind", "vllm_name", "extra"),
    [("offloading", "OffloadingConnector", {"cpu_bytes_to_use": 5}), ("lmcache", "LMCacheMPConnector", {})],
)
def test_connectors_that_keep_kv(kind: str, vllm_name: str, extra: dict[str, Any]) -> None:
    """They load in every instance, whatever its role, so none is a kv_producer."""
    for spec in instances(with_connector(kind, extra=extra), machine(cpu=False), PORTS).values():
        assert transfer(spec) == {
            "kv_connector": vllm_name,
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": extra,
        }
        assert connector_env(spec) == {}
        assert spec.fingerprint == {"connector": kind, "model": "/models/tiny"}


def test_multi_with_ours_inside() -> None:
    extra = {"offloading": {"cpu_bytes_to_use": 5}}
    multi = with_connector("multi", inside=("fleet", "offloading"), extra=extra, handoff={"on_failure": "fail"})
    made = instances(multi, machine(cpu=False), PORTS)
    alone = instances(config(), machine(cpu=False), PORTS)
    for name, spec in made.items():
        ours = {key: value for key, value in transfer(alone[name]).items() if key != "kv_load_failure_policy"}
        offloading = {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"cpu_bytes_to_use": 5},
        }
        assert transfer(spec) == {
            "kv_connector": "MultiConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "fail",
            "kv_connector_extra_config": {"connectors": [ours, offloading]},
        }
        assert spec.fingerprint is None, "ours registers the instance itself"
    only = instances(with_connector("multi", inside=("fleet",)), machine(), PORTS)
    assert [transfer(spec)["kv_role"] for spec in only.values()][:2] == ["kv_both", "kv_both"]


def test_multi_without_ours() -> None:
    multi = with_connector("multi", inside=("lmcache", "nixl"), extra={"lmcache": {"lmcache.mp.port": 7}})
    spec = instances(multi, machine(cpu=False), side_ports(1))["prefill-0"]
    children = transfer(spec)["kv_connector_extra_config"]["connectors"]
    assert [(child["kv_connector"], child["kv_role"], child["kv_connector_extra_config"]) for child in children] == [
        ("LMCacheMPConnector", "kv_both", {"lmcache.mp.port": 7}),
        ("NixlConnector", "kv_producer", {"kv_lease_duration": 30}),
    ]
    assert spec.env["VLLM_NIXL_SIDE_CHANNEL_PORT"] == "9000"
    assert spec.fingerprint == {"connector": "lmcache+nixl", "model": "/models/tiny"}


def test_what_this_machine_cannot_run_is_refused() -> None:
    everything = frozenset({"nixl", "mooncake", "lmcache"})

    def on(*, cpu: bool, modules: frozenset[str]) -> Machine:
        return Machine("/bin/python", 2, cpu, (), {}, "/cache", modules)

    def said(made: FleetConfig, where: Machine) -> str:
        with pytest.raises(ConfigError) as caught:
            connectors.check(made, where)
        return str(caught.value)

    roles = {"prefill": 0, "decode": 0, "both": 2}
    for kind, why in (
        ("mooncake", "vLLM's MooncakeConnector asks torch for an accelerator device"),
        ("lmcache", "vLLM's LMCacheMPConnector records CUDA events"),
    ):
        assert said(with_connector(kind, **roles), on(cpu=True, modules=everything)) == (
            f"connector '{kind}' does not run with vLLM's CPU build: {why}; on this machine connector.kind can be "
            "'fleet' or 'nixl'"
        )
        connectors.check(with_connector(kind, **roles), on(cpu=False, modules=everything))
    multi = with_connector("multi", inside=("fleet", "offloading"), extra={"offloading": {"cpu_bytes_to_use": 5}})
    assert said(multi, on(cpu=True, modules=everything)).startswith("connector 'offloading' does not run with vLLM's C")
    assert said(with_connector("nixl"), on(cpu=True, modules=frozenset())) == (
        "connector 'nixl' needs the Python module 'nixl', which is not installed; run: pip install nixl"
    )
    connectors.check(with_connector("nixl"), on(cpu=True, modules=frozenset({"nixl"})))
    connectors.check(config(), on(cpu=True, modules=frozenset()))
    assert said(with_connector("lmcache"), on(cpu=False, modules=everything)).startswith("prefill is 1 and decode is 2")
