"""The handoff ticket: what a prefill instance tells decode about a finished prefill, signed with the fleet's token.

It travels through the router (or any proxy that speaks NixlConnector's protocol) inside ``kv_transfer_params``. Clients
could write anything there, so decode uses only what the signature covers and ignores the rest.
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


class Ticket(Struct, frozen=True):
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
_decode = msgspec.msgpack.Decoder(Ticket).decode


def prompt_digest(token_ids: Sequence[int], salt: str | None, adapter: str | None) -> bytes:
    """32 bytes that identify what KV was computed from: tokens, the cache salt and the LoRA adapter's name."""
    head = msgspec.msgpack.encode((salt, adapter, len(token_ids)))
    return hashlib.sha256(head + b"".join(t.to_bytes(8, "big", signed=True) for t in token_ids)).digest()


def seal(ticket: Ticket, token: bytes) -> str:
    """The ticket as printable text with its signature."""
    body = _encode(ticket)
    return base64.urlsafe_b64encode(_mac(token, body) + body).decode()


def unseal(sealed: object, token: bytes) -> Ticket:
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
        return _decode(body)
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


def asks_to_hold(params: Mapping[str, Any] | None) -> bool:
    """Whether kv_transfer_params ask a prefill instance to hold the request's KV for a decode instance."""
    return bool(params) and params is not None and params.get("do_remote_decode") is True


def asks_to_load(params: Mapping[str, Any] | None) -> bool:
    """Whether kv_transfer_params ask a decode instance to take the prompt's KV from a prefill instance."""
    return bool(params) and params is not None and params.get("do_remote_prefill") is True


def _mac(token: bytes, body: bytes) -> bytes:
    return hmac.digest(token, b"vllm-fleet/ticket/" + body, "sha256")
