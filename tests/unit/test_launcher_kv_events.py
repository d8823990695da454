"""KV events of instances: only where a router wants them, and only on sockets that nobody else can reach."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from vllm_fleet.config.fleet import FleetConfig
from vllm_fleet.core.errors import ConfigError
from vllm_fleet.launcher.kv_events import ARGUMENT, arguments, router_settings
from vllm_fleet.launcher.plan import check_vllm_args, option
from vllm_fleet.router.policies.settings import PolicySettings
from vllm_fleet.router.prefix.subscriber import endpoints


def config(policy: dict[str, Any] | None = None, **fields: Any) -> FleetConfig:
    return FleetConfig.model_validate({"model": "/m", "router": {"policy": policy or {}}, **fields})


PREFIX = {"decode": "prefix"}


def test_instances_publish_where_the_router_listens() -> None:
    args = arguments(config(PREFIX), "/run/tmp", "/run/tmp/decode-0", "decode-0", None)
    told = json.loads(option(args, ARGUMENT) or "")
    folder = router_settings(config(PREFIX), "/run/tmp")["kv_events"]
    assert (told["endpoint"], told["replay_endpoint"]) == endpoints(folder, "decode-0")
    assert told["endpoint"].startswith("ipc:///run/tmp/decode-0/"), "a port would tell every user all prompts"
    assert told["enable_kv_cache_events"] is True


@pytest.mark.parametrize(
    ("policy", "fields", "engines"),
    [
        ({}, {}, None),
        ({"prefill": "prefix", "prefix_source": "prompts"}, {}, None),
        (PREFIX, {"cluster": {"address": "auto"}}, None),
        (PREFIX, {}, "2"),
    ],
)
def test_nobody_publishes_what_nobody_can_use(policy: dict[str, Any], fields: dict[str, Any], engines: str) -> None:
    assert arguments(config(policy, **fields), "/run/tmp", "/run/tmp/a", "a", engines) == []


def test_a_folder_too_long_for_sockets_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match="VLLM_FLEET_HOME"):
        arguments(config(PREFIX), "/very/long", "/tmp/fleet-x", "a", None)


def test_the_argument_is_ours_while_we_need_it() -> None:
    own = ("--kv-events-config={}",)
    check_vllm_args(config(vllm_args=own))
    with pytest.raises(ConfigError, match="--kv-events-config"):
        check_vllm_args(config(PREFIX, vllm_args=own))


def test_the_router_takes_what_it_is_told() -> None:
    for policy in ({}, PREFIX, {"prefill": "session", "session_bound": 2.0}):
        told = msgspec.convert(router_settings(config(policy), "/run/tmp"), PolicySettings)
        assert told.follows_events == (policy == PREFIX)


@pytest.mark.parametrize(
    "wrong", [{"prefill": "fastest"}, {"session_bound": 1.0}, {"session_header": "a b"}, {"load_tokens": -1}, {"x": 1}]
)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        config(wrong)
