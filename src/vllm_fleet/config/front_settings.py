"""What the router process is told of its front: see config.front for the meaning of each key."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct


class FrontSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """Who may ask, over what, and who is told about it."""

    keys_file: str | None = None
    tenant_salt: Literal["auto", "off"] = "auto"
    cert_file: str | None = None
    key_file: str | None = None
    admin_host: str = "127.0.0.1"
    admin_port: Annotated[int, Meta(ge=0, le=65535)] | None = None
    """None: metrics and timelines are served where the clients are."""
    trace_endpoint: str | None = None
    trace_share: Annotated[float, Meta(ge=0, le=1)] = 1.0
    access_log: str | None = None
