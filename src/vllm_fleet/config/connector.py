"""Settings the connector gets through vLLM's kv_connector_extra_config: plain JSON, strict, no secrets."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from vllm_fleet.core.errors import ConfigError
from vllm_fleet.wire.names import ChecksumMode, FaultKind, Name, Role, TransportName, Url, Urls

TOKEN_BYTES_MIN = 32

Seconds = Annotated[float, Meta(gt=0, le=3600)]


class FabricFaults(Struct, frozen=True, forbid_unknown_fields=True):
    """Faults that the fabric makes on purpose; see config.fleet.FaultsConfig."""

    rate: Annotated[float, Meta(ge=0, le=1)] = 0.0
    every: Annotated[int, Meta(ge=0)] = 0
    kinds: tuple[FaultKind, ...] = ("cut",)
    delay_s: Annotated[float, Meta(ge=0, le=3600)] = 0.1
    seed: int = 0


class ConnectorSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """One instance's connector."""

    fleet: Name
    name: Name
    role: Role
    token_file: str
    """Path of the file that holds the fleet's token; readable by its owner only."""
    url: Url | None = None
    """Where this instance answers HTTP; None: it does not register with a controller."""
    controller: Urls | None = None
    """Where it registers: one controller, or several of which one leads."""
    host: str = "127.0.0.1"
    transports: tuple[TransportName, ...] = ("auto",)
    checksums: ChecksumMode = "sampled"
    faults: FabricFaults | None = None
    lease_s: Seconds = 30.0
    hold_s: Seconds = 120.0
    load_s: Seconds = 10.0
    prefill_s: Seconds = 120.0
    load: Literal["quicker", "always"] = "quicker"


def parse_connector_settings(extra: dict[str, Any]) -> ConnectorSettings:
    """The settings in ``kv_connector_extra_config``; ConfigError says which key is wrong."""
    try:
        return msgspec.convert(extra, ConnectorSettings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"kv_connector_extra_config of the fleet connector: {error}") from error


def read_token(path: str | Path) -> bytes:
    """The fleet's token.

    Raises:
        ConfigError: the file is missing, too short, or open to other users.
    """
    file = Path(path)
    try:
        mode = file.stat().st_mode & 0o777
        token = bytes.fromhex(file.read_text().strip())
    except OSError as error:
        raise ConfigError(f"token_file: cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"token_file: {file} must hold hexadecimal digits") from error
    if mode & 0o077:
        raise ConfigError(f"token_file: {file} has mode {mode:03o}, others could read it; run: chmod 600 {file}")
    if len(token) < TOKEN_BYTES_MIN:
        raise ConfigError(f"token_file: {file} holds {len(token)} bytes; at least {TOKEN_BYTES_MIN} are needed")
    return token


def bearer(token: bytes) -> str:
    """The bearer token of the controller's HTTP API: derived, so that it is not the fabric's own secret."""
    return hmac.new(token, b"vllm-fleet/controller-api", hashlib.sha256).hexdigest()
