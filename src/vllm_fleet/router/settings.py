"""What the router process is started with: one JSON file, strict, no secrets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from vllm_fleet.config.front_settings import FrontSettings
from vllm_fleet.core import limits
from vllm_fleet.core.errors import ConfigError
from vllm_fleet.router.policies.settings import PolicySettings
from vllm_fleet.router.request_rules import RequestRules
from vllm_fleet.wire.names import Name, Urls


class RouterSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """One router."""

    fleet: Name
    token_file: str
    """Path of the file that holds the fleet's token; readable by its owner only."""
    controller: Urls
    """Where the fleet is watched: one controller, or several of which one leads."""
    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    """0 picks a free one; the event ``router.start`` tells which."""
    request_timeout_s: Annotated[float, Meta(gt=0, le=86_400)] = 600.0
    handoff: Literal["streamed", "sequential"] = "streamed"
    """``streamed``: prefill and decode are asked together, where the prefill instance can be told of it beforehand."""
    requests: RequestRules = RequestRules()
    policy: PolicySettings = PolicySettings()
    front: FrontSettings = FrontSettings()
    workers: Annotated[int, Meta(ge=1, le=limits.ROUTER_WORKERS_MAX)] = 1
    """Processes that share the port; more than one have a parent that starts them again."""
    stop_s: Annotated[float, Meta(ge=0, le=3600)] = limits.ROUTER_STOP_S
    """Running requests get so long when the router stops."""


_decode = msgspec.json.Decoder(RouterSettings).decode


def read_settings(path: str | Path) -> RouterSettings:
    """The settings in a file; ConfigError says in one sentence what is wrong with them."""
    try:
        return _decode(Path(path).read_bytes())
    except OSError as error:
        raise ConfigError(f"--settings: cannot read {path}: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"--settings: {path}: {error}") from error


def with_workers(settings: RouterSettings, workers: int) -> RouterSettings:
    """The same with so many processes; ConfigError when that is not possible."""
    if not 1 <= workers <= limits.ROUTER_WORKERS_MAX:
        raise ConfigError(f"--workers: {workers} is not from 1 to {limits.ROUTER_WORKERS_MAX}")
    return msgspec.structs.replace(settings, workers=workers)
