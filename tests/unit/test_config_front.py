"""The keys of the router's front: what they may be, and what the router is told of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.test_launcher_plan import PORTS, config, machine, specs
from vllm_fleet.config.front_settings import FrontSettings
from vllm_fleet.config.keys import add_key
from vllm_fleet.config.load import load
from vllm_fleet.core.errors import ConfigError
from vllm_fleet.launcher import plan
from vllm_fleet.launcher.preflight import choose_ports
from vllm_fleet.net.sockets import free_port


def router(folder: Path, text: str) -> Any:
    file = folder / "fleet.yaml"
    file.write_text(f"model: org/m\nrouter: {text}\n")
    return load(file, environ={}).config.router


def test_off_is_a_word_and_not_a_lie(tmp_path: Path) -> None:
    part = router(tmp_path, "{access_log: off, tenant_salt: off}")
    assert (part.access_log, part.tenant_salt) == ("off", "off")
    assert (router(tmp_path, "{}").access_log, router(tmp_path, '{access_log: "-"}').access_log) == ("off", "-")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{keys_file: keys}", "router.keys_file: must be an absolute path, found 'keys'"),
        ("{keys_file: /none/keys}", "router.keys_file: cannot read /none/keys: No such file or directory"),
        ("{access_log: log}", "router.access_log: must be an absolute path, found 'log'"),
        ("{access_log: on}", "router.access_log in fleet.yaml: expected"),
        ("{tls: {cert_file: /c}}", "router.tls.cert_file and router.tls.key_file: give both or neither"),
        ("{tls: {cert_file: c, key_file: /k}}", "router.tls.cert_file: must be an absolute path, found 'c'"),
        ("{trace: {endpoint: 'collector:4318'}}", "router.trace.endpoint: expected a URL with its path such as http"),
        ("{trace: {endpoint: 'http://collector:4318'}}", "router.trace.endpoint: expected a URL with its path"),
        ("{trace: {endpoint: 'http://x:999999/v1'}}", "router.trace.endpoint: expected a URL with its path"),
        ("{trace: {share: 2}}", "router.trace.share in fleet.yaml: expected a number not above 1"),
        ("{tenant_salt: always}", "router.tenant_salt in fleet.yaml: expected one of 'auto' or 'off'"),
        ("{admin_port: -1}", "router.admin_port in fleet.yaml: expected a number"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as found:
        router(tmp_path, text)
    assert str(found.value).startswith(said)


def test_the_router_is_told_everything(tmp_path: Path) -> None:
    add_key(tmp_path / "keys", "a")
    wanted = config(
        router={
            "port": 8000,
            "keys_file": str(tmp_path / "keys"),
            "tenant_salt": "off",
            "tls": {"cert_file": "/c", "key_file": "/k"},
            "admin_host": "127.0.0.2",
            "trace": {"endpoint": "http://c:4318/v1/traces", "share": 0.5},
            "access_log": "/log",
        }
    )
    place = plan.Place("/run/token", "/run/settings", "/run/state", {})
    made = {spec.name: spec for spec in plan.plan(wanted, machine(), place, {**PORTS, "router-admin": 8001})}["router"]
    assert made.settings is not None
    assert msgspec.convert(made.settings["front"], FrontSettings) == FrontSettings(
        str(tmp_path / "keys"), "off", "/c", "/k", "127.0.0.2", 8001, "http://c:4318/v1/traces", 0.5, "/log"
    )
    assert (made.url, made.admin_url) == ("https://127.0.0.1:8000", "http://127.0.0.2:8001")
    assert made.health_url == "http://127.0.0.2:8001/health"  # the launcher speaks no TLS


def test_as_it_comes_only_the_operators_have_an_address_of_their_own() -> None:
    made = specs(config(), machine())["router"]
    assert made.settings is not None
    assert msgspec.convert(made.settings["front"], FrontSettings) == FrontSettings()
    assert (made.url, made.admin_url) == ("http://127.0.0.1:8000", None)
    ports, fixed = choose_ports(config(router={"port": 0}))
    assert ports["router-admin"] not in (0, ports["router"])
    assert fixed == frozenset()
    wanted = free_port("127.0.0.1")
    ports, fixed = choose_ports(config(router={"port": 0, "admin_port": wanted}))
    assert (ports["router-admin"], fixed) == (wanted, frozenset({"router-admin"}))
    with pytest.raises(ConfigError, match=rf"^router.admin_port: {wanted} is also router.port; choose another"):
        choose_ports(config(router={"port": wanted, "admin_port": wanted}))
    with pytest.raises(ConfigError, match=r"^router.admin_host: '0.0.0.0' would listen on every interface"):
        choose_ports(config(router={"port": 0, "admin_host": "0.0.0.0"}))
