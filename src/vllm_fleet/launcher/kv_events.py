"""KV events of instances, for routers that choose by prefix. Pure.

They tell every token of every prompt, and vLLM asks nobody who subscribes. So they are published on unix sockets in a
folder that only the fleet's owner can enter, never on a port.
"""

from __future__ import annotations

import json
from typing import Any

from vllm_fleet.config.fleet import FleetConfig
from vllm_fleet.core import limits
from vllm_fleet.core.errors import ConfigError

ARGUMENT = "--kv-events-config"
_PUBLISH, _REPLAY = "kv-events", "kv-replay"  # the router's prefix/subscriber.py looks for these


def wanted(config: FleetConfig) -> bool:
    """Whether instances are to publish their events. Those on other hosts cannot be heard through unix sockets."""
    policy = config.router.policy
    by_prefix = "prefix" in (policy.prefill, policy.decode)
    return by_prefix and policy.prefix_source == "events" and config.cluster.address is None


def arguments(config: FleetConfig, tmp_folder: str, tmp: str | None, name: str, engines: str | None) -> list[str]:
    """vLLM arguments of an instance whose own folder is ``tmp``, by rights one in ``tmp_folder``.

    Several engines behind one URL publish nothing: vLLM has no unix sockets for them (offset_endpoint_port in
    vllm/distributed/kv_events.py), and the router could not choose among them anyway.

    Raises:
        ConfigError: the folder's name is too long for a socket.
    """
    if not wanted(config) or not tmp_folder or engines not in (None, "1"):
        return []
    folder = f"{tmp_folder}/{name}"
    if tmp != folder:  # RunDir.make_tmp found it too long for sockets, and made another
        raise ConfigError(
            f"router.policy.prefix_source: events need unix sockets in {folder}, whose name is too long for them; "
            "set VLLM_FLEET_HOME to a shorter folder, or prefix_source: prompts"
        )
    publish, replay = (f"{folder}/{file}" for file in (_PUBLISH, _REPLAY))
    settings = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"ipc://{publish}",
        "replay_endpoint": f"ipc://{replay}",
        "buffer_steps": limits.KV_EVENT_BUFFER_STEPS,
        "hwm": limits.KV_EVENT_QUEUE_MAX,
    }
    return [ARGUMENT, json.dumps(settings)]


def router_settings(config: FleetConfig, tmp_folder: str) -> dict[str, Any]:
    """What the router is told of policies."""
    policy = config.router.policy
    return {
        "prefill": policy.prefill,
        "decode": policy.decode,
        "session_header": policy.session_header,
        "session_bound": policy.session_bound,
        "load_tokens": policy.load_tokens,
        "kv_events": f"{tmp_folder}/{{name}}" if tmp_folder and wanted(config) else "",
        "handoff_min_tokens": config.router.handoff_min_tokens,
        "handoff_cached_share": config.router.handoff_cached_share,
    }
