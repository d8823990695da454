"""Which policies a router uses, and their settings: one part of its settings file."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from vllm_fleet.core import limits

PolicyName = Literal["round_robin", "least_load", "power_of_two", "session", "prefix"]


class PolicySettings(Struct, frozen=True, forbid_unknown_fields=True):
    """Prefill and decode choose separately."""

    prefill: PolicyName = "least_load"
    decode: PolicyName = "least_load"
    session_header: Annotated[str, Meta(min_length=1, max_length=limits.NAME_LEN_MAX)] = "x-session-id"
    session_bound: Annotated[float, Meta(gt=1.0, le=1000.0)] = 1.25
    load_tokens: Annotated[float, Meta(ge=0.0, le=1e6)] = 128.0
    kv_events: Annotated[str, Meta(max_length=limits.URL_LEN_MAX)] = ""
    """Folder of an instance's event sockets, with ``{name}`` in place of its name; empty: no events."""
    handoff_min_tokens: Annotated[int, Meta(ge=0)] = 0
    handoff_cached_share: Annotated[float, Meta(ge=0.0, le=1.0)] = 1.0

    @property
    def follows_events(self) -> bool:
        """Whether the router has a use for KV events, and knows where they are."""
        return bool(self.kv_events) and "prefix" in (self.prefill, self.decode)
