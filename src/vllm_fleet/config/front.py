"""The router's front: who may ask, over what, and who is told about it. The keys under ``router``, and their checks."""

from __future__ import annotations

import os
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec
from pydantic import Field

from vllm_fleet.config.front_settings import FrontSettings
from vllm_fleet.config.keys import read_keys
from vllm_fleet.config.part import OFF, Part
from vllm_fleet.core import limits
from vllm_fleet.core.errors import ConfigError


class TlsConfig(Part):
    """https for clients."""

    cert_file: str | None = Field(None, description="absolute path of the certificate and its chain, PEM; then https")
    key_file: str | None = Field(None, description="absolute path of its key, readable by its owner only")


class TraceConfig(Part):
    """OpenTelemetry spans; docs/observability.md."""

    endpoint: str | None = Field(
        None, max_length=limits.URL_LEN_MAX, description="URL of an OTLP/HTTP collector: http://HOST:4318/v1/traces"
    )
    share: float = Field(
        1.0, ge=0, le=1, description="share of requests that are traced; a caller's traceparent decides for its own"
    )


class FrontConfig(Part):
    """What RouterConfig has of it; a part of its own only here, in the file."""

    keys_file: str | None = Field(
        None, description="absolute path of the file of API keys (vllm-fleet keys add); none: nobody needs one"
    )
    tenant_salt: Annotated[Literal["auto", "off"], OFF] = Field(
        "auto", description="keep the prefixes of API keys apart in the instances' caches; auto: where there are keys"
    )
    tls: TlsConfig = TlsConfig()
    admin_host: str = Field("127.0.0.1", description="address of the router's metrics and timelines")
    admin_port: int = Field(0, ge=0, le=65535, description="their port; 0 picks a free one, which status shows")
    trace: TraceConfig = TraceConfig()
    access_log: Annotated[str, OFF] = Field(
        "off", min_length=1, description="off, - (the router's own log) or the absolute path of a file"
    )


def front_settings(part: FrontConfig, admin_port: int | None) -> dict[str, object]:
    """What the router is told, as it stands in its settings file."""
    made = FrontSettings(
        part.keys_file,
        part.tenant_salt,
        part.tls.cert_file,
        part.tls.key_file,
        part.admin_host,
        admin_port,
        part.trace.endpoint,
        part.trace.share,
        None if part.access_log == "off" else part.access_log,
    )
    told: dict[str, object] = msgspec.to_builtins(made)
    return told


def check_front(part: FrontConfig) -> None:
    """ConfigError for settings that do not fit together, and files that cannot be used."""
    files = {
        "router.keys_file": part.keys_file,
        "router.tls.cert_file": part.tls.cert_file,
        "router.tls.key_file": part.tls.key_file,
        "router.access_log": None if part.access_log in ("off", "-") else part.access_log,
    }
    for key, file in files.items():
        if file is not None and not os.path.isabs(file):
            raise ConfigError(f"{key}: must be an absolute path, found {file!r}")
    if (part.tls.cert_file is None) != (part.tls.key_file is None):
        raise ConfigError("router.tls.cert_file and router.tls.key_file: give both or neither")
    if part.keys_file is not None:
        read_keys(part.keys_file)
    endpoint = part.trace.endpoint
    if endpoint is not None:
        try:
            parts = urlsplit(endpoint)
            fits = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and len(parts.path) > 1
        except ValueError:
            fits = False
        if not fits:
            raise ConfigError(
                f"router.trace.endpoint: expected a URL with its path such as http://127.0.0.1:4318/v1/traces, "
                f"found {endpoint!r}"
            )
