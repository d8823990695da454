"""What the operator decides about every request: how often it is tried, how long it waits, when it is turned away."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from vllm_fleet.core import limits

Resume = Literal["exact", "always", "off"]
"""Streams that an instance's death cuts off: ``exact`` goes on where nobody can tell, ``always`` also where the rest
may differ from what would have come, ``off`` ends them with an error."""

_Seconds = Annotated[float, Meta(ge=0, le=86_400)]


class RequestRules(Struct, frozen=True, forbid_unknown_fields=True):
    """The settings under ``router`` that bear on requests (docs/requests.md): one part of its settings file."""

    resume: Resume = "exact"
    attempts_max: Annotated[int, Meta(ge=1, le=100)] = limits.DECODE_ATTEMPTS_MAX
    retry_budget: Annotated[float, Meta(ge=0, le=10)] = 0.2
    """Retries that sick instances may cause, as a share of recent requests."""
    first_byte_s: _Seconds = 0.0
    """A stream without a byte for so long is asked for elsewhere; 0: never."""
    stall_s: _Seconds = 60.0
    """A stream that goes silent for so long is resumed elsewhere; 0: never."""
    in_flight_max: Annotated[int, Meta(ge=1, le=limits.REQUESTS_MAX)] = limits.IN_FLIGHT_MAX
    instance_requests_max: Annotated[int, Meta(ge=0, le=limits.REQUESTS_MAX)] = 0
    """Requests at one instance at a time; 0: no limit."""
    queue_max: Annotated[int, Meta(ge=0, le=limits.REQUESTS_MAX)] = limits.QUEUE_MAX
    queue_s: _Seconds = 30.0
    """A request waits so long for its turn, then it is refused."""
