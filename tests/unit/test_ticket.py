"""Tickets: only what this fleet signed is read; everything else is a declared error, quickly."""

from __future__ import annotations

import base64
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_fleet.core import limits
from vllm_fleet.core.errors import AuthError, BadRequest, FleetError
from vllm_fleet.wire.ticket import (
    FIELD,
    StreamTicket,
    Ticket,
    WorkerAddress,
    asks_to_hold,
    asks_to_load,
    prompt_digest,
    seal,
    stream_params,
    transfer_params,
    unseal,
)

TOKEN = bytes(range(32))
TICKET = Ticket("t", "engine", 3, prompt_digest([1, 2, 3], None, None), (WorkerAddress("127.0.0.1", 5000),))
STREAM = StreamTicket("s", "engine", (WorkerAddress("127.0.0.1", 5000), WorkerAddress("::1", 5001)))


@pytest.mark.parametrize("ticket", [TICKET, STREAM])
def test_a_sealed_ticket_comes_back(ticket: Ticket | StreamTicket) -> None:
    back = unseal(seal(ticket, TOKEN), TOKEN)
    assert back == ticket
    assert type(back) is type(ticket)


def test_another_token_does_not_open_it() -> None:
    with pytest.raises(AuthError):
        unseal(seal(TICKET, TOKEN), bytes(32))


@pytest.mark.parametrize("ticket", [TICKET, STREAM])
def test_every_flipped_bit_is_found(ticket: Ticket | StreamTicket) -> None:
    raw = bytearray(base64.urlsafe_b64decode(seal(ticket, TOKEN)))
    for bit in range(8 * len(raw)):
        raw[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(AuthError):
            unseal(base64.urlsafe_b64encode(bytes(raw)).decode(), TOKEN)
        raw[bit // 8] ^= 1 << (bit % 8)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(JSON_VALUES)
def test_anything_else_is_a_declared_error(value: Any) -> None:
    with pytest.raises(FleetError):
        unseal(value, TOKEN)
    params = value if isinstance(value, dict) else {"do_remote_prefill": value}
    assert asks_to_load(params) is (params.get("do_remote_prefill") is True)
    assert asks_to_hold(params) is False or params.get("do_remote_decode") is True


@pytest.mark.parametrize("sealed", ["", "é", "====", "a" * (limits.TICKET_BYTES_MAX + 1), None, 7, b"x", ["x"]])
def test_what_is_no_ticket(sealed: object) -> None:
    with pytest.raises(FleetError):
        unseal(sealed, TOKEN)


def test_a_signed_body_of_another_shape_is_refused() -> None:
    class Other(msgspec.Struct):
        transfer: str

    with pytest.raises(BadRequest, match="not one this version reads"):
        unseal(seal(Other("t"), TOKEN), TOKEN)  # type: ignore[arg-type]


def test_the_digest_covers_tokens_salt_and_adapter() -> None:
    digests = {
        prompt_digest([1, 2], None, None),
        prompt_digest([1, 2, 3], None, None),
        prompt_digest([2, 1], None, None),
        prompt_digest([258], None, None),
        prompt_digest([1, 2], "s", None),
        prompt_digest([1, 2], None, "s"),
        prompt_digest([1, 2], "", None),
    }
    assert len(digests) == 7


def test_params_have_the_keys_proxies_know() -> None:
    params = transfer_params(TICKET, TOKEN, request_id="r", block_ids=[[4, 5]])
    assert msgspec.json.decode(msgspec.json.encode(params)) == params
    assert asks_to_load(params)
    assert not asks_to_hold(params)
    assert params["remote_host"], params["remote_port"] == ("127.0.0.1", 5000)
    assert params["remote_block_ids"] == [[4, 5]]
    assert unseal(params[FIELD], TOKEN) == TICKET


def test_a_stream_ticket_needs_a_worker() -> None:
    with pytest.raises(BadRequest, match="not one this version reads"):
        unseal(seal(StreamTicket("s", "engine", ()), TOKEN), TOKEN)


def test_both_sides_of_a_streamed_handoff_get_one_ticket() -> None:
    hold, load = stream_params(STREAM, TOKEN)
    assert (asks_to_hold(hold), asks_to_load(hold)) == (True, False)
    assert (asks_to_hold(load), asks_to_load(load)) == (False, True)
    assert hold[FIELD] == load[FIELD]
    assert unseal(hold[FIELD], TOKEN) == STREAM
    for params in (hold, load):
        assert msgspec.json.decode(msgspec.json.encode(params)) == params
