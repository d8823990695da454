"""What the router does for a request that meets trouble: the keys under ``router``, and what its process is told."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from vllm_fleet.config.part import Part
from vllm_fleet.core import limits


class RequestsConfig(Part):
    """What RouterConfig has of it; a part of its own only here, in the file."""

    resume: Literal["exact", "always", "off"] = Field(
        "exact",
        description="streams cut off by a death go on elsewhere: where nobody can tell (exact), always, or never (off)",
    )
    attempts_max: int = Field(
        limits.DECODE_ATTEMPTS_MAX, ge=1, le=100, description="instances that one request is sent to for its answer"
    )
    retry_budget: float = Field(
        0.2, ge=0, le=10, description="retries that failing instances may cause, as a share of recent requests"
    )
    first_byte_s: float = Field(
        0.0, ge=0, le=86_400, description="a stream without a byte for so long is asked for elsewhere; 0: never"
    )
    stall_s: float = Field(
        60.0, ge=0, le=86_400, description="a stream that goes silent for so long is resumed elsewhere; 0: never"
    )
    in_flight_max: int = Field(
        limits.IN_FLIGHT_MAX, ge=1, le=limits.REQUESTS_MAX, description="requests at instances at a time; others wait"
    )
    instance_requests_max: int = Field(
        0, ge=0, le=limits.REQUESTS_MAX, description="requests at one instance at a time, for its answers; 0: no limit"
    )
    queue_max: int = Field(
        limits.QUEUE_MAX, ge=0, le=limits.REQUESTS_MAX, description="requests that wait for their turn; then 429"
    )
    queue_s: float = Field(30.0, ge=0, le=86_400, description="longest time a request waits for its turn; then 429")


def request_settings(config: RequestsConfig) -> dict[str, Any]:
    """The part ``requests`` of the router's settings file."""
    return config.model_dump(mode="json", include=set(RequestsConfig.model_fields))
