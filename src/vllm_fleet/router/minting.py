"""Tickets of streamed handoffs. Never log what is made here: whoever holds a ticket may take the KV."""

from __future__ import annotations

import msgspec

from vllm_fleet.core.env import Env
from vllm_fleet.router.steps import Mint
from vllm_fleet.wire.control import Member
from vllm_fleet.wire.ticket import StreamTicket, stream_params

_encode = msgspec.json.Encoder().encode


def minting(token: bytes, env: Env) -> Mint:
    """Makes tickets signed with the fleet's token, each for a transfer of its own."""

    def mint(prefill: Member) -> tuple[bytes, bytes]:
        ticket = StreamTicket(transfer=env.new_id(), engine=prefill.incarnation, workers=prefill.workers)
        for_prefill, for_decode = stream_params(ticket, token)
        return _encode(for_prefill), _encode(for_decode)

    return mint
