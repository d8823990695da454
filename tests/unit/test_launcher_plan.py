"""launcher.plan: whole command lines and environments."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from vllm_fleet.config.fleet import FleetConfig
from vllm_fleet.core.errors import ConfigError
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
        "kv_role": "kv_consumer",
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
            "lease_s": 30.0,
            "hold_s": 120.0,
            "load_s": 10.0,
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
    assert roles == {
        "prefill-0": "kv_producer",
        "decode-0": "kv_consumer",
        "decode-1": "kv_consumer",
        "both-0": "kv_both",
    }


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
    with pytest.raises(ConfigError, match=r"^4 instances of 2 GPUs need 8, this machine offers 3; start fewer, or set"):
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
    with pytest.raises(ConfigError, match=r"^vllm_args must not hold --"):
        check_vllm_args(("--max-model-len", "512", arg))


def test_what_only_looks_like_ours_is_not_refused() -> None:
    check_vllm_args(("--model-impl", "auto", "--kv-cache-dtype=auto", "-tp", "2", "--max-model-len", "1", "port", "--"))


def test_urls() -> None:
    assert url("127.0.0.1", 1) == "http://127.0.0.1:1"
    assert url("::1", 1) == "http://[::1]:1"
