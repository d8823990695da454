"""Several controllers in one fleet: settings, ports, processes, and who is told of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_launcher_plan import PLACE, PORTS, config, machine
from vllm_fleet.config.fleet import FleetConfig
from vllm_fleet.config.load import load
from vllm_fleet.controller.settings import read_settings
from vllm_fleet.core.errors import ConfigError
from vllm_fleet.launcher.plan import plan
from vllm_fleet.launcher.preflight import choose_ports
from vllm_fleet.net import sockets
from vllm_fleet.router.settings import read_settings as read_router

URLS = ["http://127.0.0.1:7100", "http://127.0.0.1:7101"]


def two(**changes: Any) -> FleetConfig:
    return config(controller={"store": "etcd", "replicas": 2, **changes}, router={"port": 0})


def test_each_controller_has_a_name_a_port_and_settings_and_all_are_told_of_all(tmp_path: Path) -> None:
    made = {
        spec.name: spec for spec in plan(two(), machine(), PLACE, PORTS | {"controller-0": 7100, "controller-1": 7101})
    }
    assert list(made)[:3] == ["controller-0", "controller-1", "router"]
    for index in range(2):
        spec = made[f"controller-{index}"]
        assert (spec.kind, spec.url) == ("controller", URLS[index])
        assert spec.argv[-1] == spec.settings_file == f"/run/settings/controller-{index}.json"
        (tmp_path / "c.json").write_text(json.dumps(spec.settings))
        settings = read_settings(tmp_path / "c.json")
        assert settings.etcd is not None
        assert (settings.port, settings.etcd.endpoints) == (7100 + index, ("http://127.0.0.1:2379",))
    (tmp_path / "r.json").write_text(json.dumps(made["router"].settings))
    assert read_router(tmp_path / "r.json").controller == tuple(URLS)
    told = json.loads(made["decode-0"].argv[made["decode-0"].argv.index("--kv-transfer-config") + 1])
    assert told["kv_connector_extra_config"]["controller"] == URLS


def test_ports_follow_the_chosen_one() -> None:
    ports, fixed = choose_ports(two())
    assert {"controller-0", "controller-1"} <= set(ports)
    assert len(set(ports.values())) == len(ports)
    assert fixed == frozenset()
    with sockets.listen("127.0.0.1", 0, setting="test") as taken:
        port = int(taken.getsockname()[1])
        with pytest.raises(ConfigError, match=rf"^controller.port: port ({port - 1}|{port}) on 127.0.0.1 is taken"):
            choose_ports(two(port=port - 1))
    with pytest.raises(ConfigError, match="2 controllers need as many ports, up to 65536"):
        choose_ports(two(port=65535))


def problem(tmp_path: Path, controller: str) -> str:
    file = tmp_path / "fleet.yaml"
    file.write_text(f"model: org/model\ncontroller: {{{controller}}}\n")
    with pytest.raises(ConfigError) as caught:
        load(file, environ={})
    return str(caught.value).replace(str(tmp_path), "DIR")


@pytest.mark.parametrize(
    ("controller", "said"),
    [
        ("replicas: 2", "controller.replicas is 2, but controllers can share a journal only in an etcd"),
        ("replicas: 0", "controller.replicas"),
        ("store: redis", "controller.store"),
        ("store: etcd, etcd: {endpoints: []}", "controller.etcd.endpoints"),
        ("store: etcd, etcd: {endpoints: ['h:1']}", "an endpoint is http://HOST:PORT or https://HOST:PORT"),
        ("store: etcd, etcd: {endpoints: ['http://u:p@h:1']}", "put user and password into controller.etcd.credent"),
        ("store: etcd, etcd: {endpoints: ['http://h:1', 'https://h:1']}", "all must begin with http, or all with"),
        ("store: etcd, etcd: {lease_s: 1}", "controller.etcd.lease_s"),
        ("store: etcd, etcd: {credentials_file: here}", "credentials_file: must be an absolute path, found 'here'"),
        ("store: etcd, etcd: {credentials_file: /nowhere}", "cannot read /nowhere: No such file"),
        ("store: etcd, etcd: {ca_file: /nowhere, endpoints: ['https://h:1']}", "ca_file: there is no file /nowhere"),
        ("store: etcd, etcd: {ca_file: /etc/passwd}", "with ca_file or cert_file it must begin with https"),
        ("store: etcd, etcd: {cert_file: /etc/passwd, endpoints: ['https://h:1']}", "key_file: give both or neither"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(tmp_path: Path, controller: str, said: str) -> None:
    assert said in problem(tmp_path, controller)


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        ("user:secret\n", 0o644, "has mode 644, others could read it; run: chmod 600"),
        ("usersecret", 0o600, "must hold one line USER:PASSWORD"),
        ("user:a\nb", 0o600, "must hold one line USER:PASSWORD"),
    ],
)
def test_credentials_are_checked_and_not_shown(tmp_path: Path, content: str, mode: int, said: str) -> None:
    file = tmp_path / "credentials"
    file.write_text(content)
    file.chmod(mode)
    text = problem(tmp_path, f"store: etcd, etcd: {{credentials_file: {file}}}")
    assert said in text
    assert "secret" not in text
