"""Bounded field types shared by all messages."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from vllm_fleet.core import limits

DECODE_ERRORS = (ValueError, RecursionError)
"""What msgspec raises for bytes that are not the message asked for (UnicodeDecodeError is a ValueError)."""

Role = Literal["prefill", "decode", "both"]
ROLES: tuple[Role, ...] = ("prefill", "decode", "both")
Name = Annotated[str, Meta(min_length=1, max_length=limits.NAME_LEN_MAX, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z")]
Id = Annotated[str, Meta(min_length=1, max_length=limits.ID_LEN_MAX)]
Url = Annotated[str, Meta(min_length=1, max_length=limits.URL_LEN_MAX, pattern=r"^https?://[^\s/?#]+\Z")]
Urls = Url | Annotated[tuple[Url, ...], Meta(min_length=1, max_length=limits.CONTROLLERS_MAX)]
"""Where a service answers; several: of these one leads."""
Port = Annotated[int, Meta(ge=1, le=65535)]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]

TransportName = Literal["auto", "cma", "cuda_ipc", "mooncake", "nccl", "nixl", "tcp"]
ChecksumMode = Literal["off", "sampled", "full"]
FaultKind = Literal["cut", "delay", "reorder", "refuse", "truncate", "corrupt"]
"""Faults that the fabric can be told to make; fabric/faults.py says what each does."""
