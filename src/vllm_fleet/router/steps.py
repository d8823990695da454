"""What a request's decisions may be, and how what they order may fail (handoff.py decides, exchange.py acts)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from vllm_fleet.router.problem import Problem
from vllm_fleet.wire.control import Member

FailureKind = Literal[
    "refused", "disconnected", "gone", "too_large", "bad_answer", "status_5xx", "slow", "stalled", "busy"
]
"""``refused``: no connection came up, so the instance never saw the request. ``gone``: the controller says so.
``slow``: no first byte within router.first_byte_s. ``stalled``: silent for router.stall_s. ``busy``: 503 with
Retry-After."""

SICK = frozenset({"bad_answer", "status_5xx", "slow", "stalled", "too_large"})
"""Failures that repeat with each request: retries of these come out of the fleet's budget."""


@dataclass(frozen=True, slots=True)
class Send:
    """Post ``body`` to ``member``."""

    stage: Literal["prefill", "decode"]
    member: Member
    body: bytes
    label: str | None = None
    """By which the KV events of this request's blocks will be known (prefix/book.py)."""
    path: str = ""


@dataclass(frozen=True, slots=True)
class Together:
    """Post both at the same time."""

    prefill: Send
    decode: Send


@dataclass(frozen=True, slots=True)
class GoOn:
    """Wait for what still runs."""


@dataclass(frozen=True, slots=True)
class PassOn:
    """The answer in hand is the client's answer."""


@dataclass(frozen=True, slots=True)
class Fail:
    """Nothing more can be done."""

    problem: Problem


@dataclass(frozen=True, slots=True)
class Cut:
    """The answer broke after the client had got a part of it."""

    kind: FailureKind
    member: Member


Step = Cut | Send | Together | GoOn | PassOn | Fail

Mode = Literal["streamed", "sequential"]

Mint = Callable[[Member], tuple[bytes, bytes]]
"""A fresh ticket for a transfer from this prefill instance: kv_transfer_params for prefill, and those for decode."""
