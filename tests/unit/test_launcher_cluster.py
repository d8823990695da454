"""launcher.hosts.cluster and late: plans for nodes that are not known yet."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vllm_fleet.config.fleet import FleetConfig
from vllm_fleet.config.load import load
from vllm_fleet.core.errors import ConfigError
from vllm_fleet.launcher.hosts import late
from vllm_fleet.launcher.hosts.cluster import ClusterPlanner, MixedLauncher, check, needs
from vllm_fleet.launcher.hosts.late import Site, settled
from vllm_fleet.launcher.machine import Machine
from vllm_fleet.launcher.rundir import RunDir
from vllm_fleet.launcher.spec import ProcessSpec

MACHINE = Machine("/here/python", 2, True, (), {"TERM": "x", "PYTHONHASHSEED": "7"}, "/home/me/.cache/vllm-fleet")
SITE = Site("10.0.0.7", 40_123, 50_000, "/tmp/fleet-node-1", "/home/there/.cache/vllm-fleet", "/there/python")


def config(**settings: Any) -> FleetConfig:
    cluster = {"address": "auto", **settings.pop("cluster", {})}
    tree = {"model": "/models/m", "cluster": cluster, "router": {"port": 0}, **settings}
    return FleetConfig.model_validate_json(json.dumps(tree), strict=True)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "fleet")
    made.folder.mkdir()
    return made


def test_an_instance_is_planned_in_words_and_settled_on_its_node(run: RunDir) -> None:
    planner = ClusterPlanner(config(), MACHINE, run)
    assert set(planner.ports) == {"router", "router-admin", "controller"}, "nobody knows which ports a node has free"
    spec = planner.instance("decode-0", "decode", None)
    assert (spec.needs, spec.sides) == ({"CPU": 1.0, "GPU": 0.0}, 0)
    there = settled(spec, SITE)
    assert there.url == "http://10.0.0.7:40123"
    assert there.argv[0] == "/there/python"
    words = dict(zip(there.argv[3::1], there.argv[4::1], strict=False))
    assert (words["--host"], words["--port"]) == ("10.0.0.7", "40123")
    extra = json.loads(words["--kv-transfer-config"])["kv_connector_extra_config"]
    assert (extra["url"], extra["host"]) == (there.url, "10.0.0.7")
    assert extra["token_file"] == "/tmp/fleet-node-1/token"
    assert there.env["TMPDIR"] == "/tmp/fleet-node-1"
    assert there.env["VLLM_HOST_IP"] == "10.0.0.7"
    assert there.env["PYTHONHASHSEED"] == "0", "what the environment here says is not known there"
    assert there.env["OMP_NUM_THREADS"] == "1"
    assert "{fleet." not in repr(there)
    assert str(run.folder) not in repr(there)


def test_controller_and_router_stay_here(run: RunDir) -> None:
    assert [spec.needs for spec in ClusterPlanner(config(), MACHINE, run).own()] == [None, None]


def test_side_ports_of_upstream_connectors_are_the_nodes(run: RunDir) -> None:
    planner = ClusterPlanner(config(connector={"kind": "nixl"}, vllm_args=["-tp", "2"]), MACHINE, run)
    spec = planner.instance("prefill-0", "prefill", None)
    assert spec.sides == 2
    there = settled(spec, SITE)
    assert there.env["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "10.0.0.7"
    assert there.env["VLLM_NIXL_SIDE_CHANNEL_PORT"] == "50000"


def test_needs_are_gpus_of_the_role_and_what_the_user_names() -> None:
    gpus = replace(MACHINE, cpu_build=False)
    chosen = config(
        vllm_args=["-tp", "2"], decode_args=["-tp", "4"], cluster={"cpus": 3, "resources": {"a": 1},
        "prefill_resources": {"h200": 1}, "decode_resources": {"a": 2}},
    )  # fmt: skip
    assert needs(chosen, gpus, "prefill") == {"CPU": 3.0, "GPU": 2.0, "a": 1.0, "h200": 1.0}
    assert needs(chosen, gpus, "decode") == {"CPU": 3.0, "GPU": 4.0, "a": 2.0}
    assert needs(config(env={"CUDA_VISIBLE_DEVICES": "0"}), gpus, "both")["GPU"] == 0.0
    assert needs(chosen, MACHINE, "decode")["GPU"] == 0.0, "the CPU build uses none"


@pytest.mark.parametrize("resources", [{"GPU": 1}, {"h200": -1}])
def test_amounts_that_cannot_be_asked_for(resources: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"^cluster\.resources: "):
        check(config(cluster={"resources": resources}))


@pytest.mark.parametrize("good", ["auto", "ray://head:10001", "10.0.0.1:6379", "[fd00::1]:6379", "ray://[::1]:10001"])
def test_addresses(good: str, tmp_path: Path) -> None:
    flags = {"model": ("--model", "m"), "cluster.address": ("--cluster", good)}
    assert load(environ={}, flags=flags, folder=tmp_path).config.cluster.address == good


@pytest.mark.parametrize("bad", ["", "head", "http://head:1", "ray://head", "head:x", "a b:1"])
def test_what_is_no_address_is_refused(bad: str, tmp_path: Path) -> None:
    flags = {"model": ("--model", "m"), "cluster.address": ("--cluster", bad)}
    with pytest.raises(ConfigError, match=r"^cluster\.address"):
        load(environ={}, flags=flags, folder=tmp_path)


def test_ipv6_hosts_get_brackets_in_urls_only() -> None:
    site = Site("fd00::7", 1, 0, "/f", "/c", "/p")
    spec = ProcessSpec(
        "a", "instance", "both", ("--host", late.HOST), f"http://{late.HOST}:{late.PORT}", {"U": late.URL}
    )
    there = settled(spec, site)
    assert (there.url, there.argv, there.env) == (
        "http://[fd00::7]:1",
        ("--host", "fd00::7"),
        {"U": "http://[fd00::7]:1"},
    )


class Noting:
    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self.told = name, told

    def start(self, spec: ProcessSpec, log_file: Path) -> Any:
        self.told.append(f"{self.name} starts {spec.name}")

    def close(self) -> None:
        self.told.append(f"{self.name} closes")


def test_only_what_asks_for_a_node_goes_to_one() -> None:
    told: list[str] = []
    mixed = MixedLauncher(Noting("here", told), Noting("cluster", told))
    mixed.start(ProcessSpec("router", "router", "router", (), ""), Path("log"))
    mixed.start(ProcessSpec("both-0", "instance", "both", (), "", needs={}), Path("log"))
    mixed.close()
    assert told == ["here starts router", "cluster starts both-0", "cluster closes", "here closes"]
