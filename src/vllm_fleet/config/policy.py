"""Who gets a request, and whether it is handed off: keys under ``router``; docs/routing.md."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vllm_fleet.config.part import Part

PolicyName = Literal["round_robin", "least_load", "power_of_two", "session", "prefix"]


class PolicyConfig(Part):
    """Prefill and decode choose separately."""

    prefill: PolicyName = Field(
        "least_load",
        description="how prefill instances are chosen: round_robin, least_load, power_of_two, session or prefix",
    )
    decode: PolicyName = Field("least_load", description="how decode instances (and both) are chosen: the same names")
    session_header: str = Field(
        "x-session-id",
        pattern=r"^[A-Za-z0-9-]{1,64}$",
        description="for session: header that names a request's session; else prompt_cache_key or user of its body",
    )
    session_bound: float = Field(
        1.25, gt=1, le=1000, description="for session: an instance with over so many times the mean load is passed"
    )
    prefix_source: Literal["events", "prompts"] = Field(
        "events", description="for prefix: believe the instances' KV events, or only what the router sent them"
    )
    load_tokens: float = Field(
        128.0,
        ge=0,
        le=1e6,
        description="for prefix: cached tokens of a prompt that one request less in flight is worth",
    )


class RoutingConfig(Part):
    """What RouterConfig has of it; a part of its own only here, in the file."""

    handoff_min_tokens: int = Field(
        0,
        ge=0,
        le=10**7,
        description="decode computes a prompt itself if it is shorter, or so little of it is missing there",
    )
    handoff_cached_share: float = Field(
        0.9, ge=0, le=1, description="... or if it holds this share of it, as far as policy prefix knows; 1: never"
    )
    policy: PolicyConfig = PolicyConfig()
