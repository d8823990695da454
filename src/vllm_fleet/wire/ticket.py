"""Handoff tickets: which transfer a request belongs to and who computes its prompt, signed with the fleet's token.

A prefill instance mints a Ticket when it has finished (sequential handoff); the router, or any proxy that speaks
NixlConnector's protocol, carries it to decode inside ``kv_transfer_params``. For a streamed handoff the router mints a
StreamTicket and gives it to both instances together. Clients could write anything into ``kv_transfer_params``, so only
what a signature covers is used. Both are good for one use: a transfer ends when decode has closed it, when its lease is
over or when the prefill engine has gone, and is unknown from then on.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from vllm_fleet.core import limits
from vllm_fleet.core.errors import AuthError, BadRequest
from vllm_fleet.wire.names import DECODE_ERRORS, Count, Id, Port

FIELD = "fleet_ticket"
"""The key inside kv_transfer_params that holds the signed ticket; all other keys are for proxies only."""

_MAC_BYTES = 32


class WorkerAddress(Struct, frozen=True):
    """Where one worker of the prefill instance takes fabric connections."""

    host: Annotated[str, Meta(min_length=1, max_length=255)]
    port: Port


class StreamTicket(Struct, frozen=True, tag="stream"):
    """One prefill that decode takes over while it is computed."""

    transfer: Id
    engine: Id
    """The prefill engine's id (the incarnation it registered with); another after each restart."""
    workers: Annotated[tuple[WorkerAddress, ...], Meta(min_length=1, max_length=1024)]
    """One per tensor-parallel rank of the prefill instance, in rank order."""


class Ticket(Struct, frozen=True, tag="finished"):
    """One finished prefill that decode may take over, once."""

    transfer: Id
    engine: Id
    """The prefill engine's id; another after each restart."""
    tokens: Count
    """Prompt tokens whose KV is held."""
    prompt: Annotated[bytes, Meta(min_length=32, max_length=32)]
    """prompt_digest of the prompt: KV is only ever used for the prompt it was computed from."""
    workers: Annotated[tuple[WorkerAddress, ...], Meta(min_length=1, max_length=1024)]
    """One per tensor-parallel rank of the prefill instance, in rank order."""


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Ticket | StreamTicket).decode


def prompt_digest(token_ids: Sequence[int], salt: str | None, adapter: str | None) -> bytes:
    """32 bytes that identify what KV was computed from: tokens, the cache salt and the LoRA adapter's name."""
    head = msgspec.msgpack.encode((salt, adapter, len(token_ids)))
    return hashlib.sha256(head + b"".join(t.to_bytes(8, "big", signed=True) for t in token_ids)).digest()


def seal(ticket: Ticket | StreamTicket, token: bytes) -> str:
    """The ticket as printable text with its signature."""
    body = _encode(ticket)
    return base64.urlsafe_b64encode(_mac(token, body) + body).decode()


def unseal(sealed: object, token: bytes) -> Ticket | StreamTicket:
    """The ticket behind ``sealed``.

    Raises:
        BadRequest: not a ticket at all.
        AuthError: not signed with this token.
    """
    if not isinstance(sealed, str) or not sealed or len(sealed) > limits.TICKET_BYTES_MAX:
        raise BadRequest(f"{FIELD} must be text of at most {limits.TICKET_BYTES_MAX} characters")
    try:
        raw = base64.b64decode(sealed.encode("ascii"), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise BadRequest(f"{FIELD} is not base64") from None
    mac, body = raw[:_MAC_BYTES], raw[_MAC_BYTES:]
    if not hmac.compare_digest(mac, _mac(token, body)):
        raise AuthError("the ticket was not signed by this fleet")
    try:
        ticket: Ticket | StreamTicket = _decode(body)
        return ticket
    except DECODE_ERRORS as error:
        raise BadRequest(f"the ticket was signed by this fleet but is not one this version reads: {error}") from None


def transfer_params(
    ticket: Ticket, token: bytes, *, request_id: str, block_ids: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """The kv_transfer_params of a prefill answer: NixlConnector's keys, for proxies that look, and the ticket."""
    first = ticket.workers[0]
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_block_ids": [list(group) for group in block_ids],
        "remote_engine_id": ticket.engine,
        "remote_request_id": request_id,
        "remote_host": first.host,
        "remote_port": first.port,
        "remote_num_tokens": ticket.tokens,
        "tp_size": len(ticket.workers),
        FIELD: seal(ticket, token),
    }


def stream_params(ticket: StreamTicket, token: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """The kv_transfer_params of a streamed handoff: what prefill gets, and what decode gets."""
    sealed = seal(ticket, token)
    prefill = {"do_remote_decode": True, "do_remote_prefill": False, FIELD: sealed}
    return prefill, {"do_remote_decode": False, "do_remote_prefill": True, FIELD: sealed}


def asks_to_hold(params: Mapping[str, Any] | None) -> bool:
    """Whether kv_transfer_params ask a prefill instance to hold the request's KV for a decode instance."""
    return bool(params) and params is not None and params.get("do_remote_decode") is True


def asks_to_load(params: Mapping[str, Any] | None) -> bool:
    """Whether kv_transfer_params ask a decode instance to take the prompt's KV from a prefill instance."""
    return bool(params) and params is not None and params.get("do_remote_prefill") is True


def _mac(token: bytes, body: bytes) -> bytes:
    return hmac.digest(token, b"vllm-fleet/ticket/" + body, "sha256")
