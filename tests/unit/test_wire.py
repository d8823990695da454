"""The fabric's messages: they come back, and what is over a limit is refused. Damaged ones: tests/fuzz."""

from __future__ import annotations

import msgspec
import pytest

from vllm_fleet.core import limits
from vllm_fleet.wire import fabric as wire
from vllm_fleet.wire.names import DECODE_ERRORS

HANDLE = wire.PoolHandle("tcp", "pool", (1, 2), b"x")
MESSAGES: tuple[wire.Question | wire.Answer, ...] = (
    wire.Describe(),
    wire.Open("t"),
    wire.Close("t", taken=True),
    wire.Read("g", "p", bytes(24)),
    wire.Ping(),
    wire.Description("e", 0, 1, {"dtype": "bf16"}, (HANDLE,)),
    wire.Opened((1, 2, 3)),
    wire.Closed(valid=False),
    wire.Reading(7),
    wire.Pong(),
    wire.Denied("unsupported"),
)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_messages_come_back(message: wire.Question | wire.Answer) -> None:
    decode = wire.decode_question if isinstance(message, wire.Question) else wire.decode_answer
    assert decode(wire.encode(message)) == message


def test_deep_nesting_is_a_declared_error() -> None:
    with pytest.raises(DECODE_ERRORS):
        wire.decode_question(b"\x91" * 200_000)


@pytest.mark.parametrize(
    "too_much",
    [
        wire.Open("t" * (limits.ID_LEN_MAX + 1)),
        wire.Open(""),
        wire.Read("g", "p", b""),
        wire.Read("g", "p", bytes(wire.RUN_BYTES * (limits.RUNS_MAX + 1))),
    ],
    ids=["long id", "no id", "no runs", "many runs"],
)
def test_what_is_over_a_limit_is_refused(too_much: wire.Question) -> None:
    with pytest.raises(msgspec.ValidationError):
        wire.decode_question(wire.encode(too_much))


def test_unknown_fields_are_ignored_and_unknown_tags_refused() -> None:
    newer = msgspec.msgpack.encode({"type": "open", "transfer": "t", "added_later": 1})
    assert wire.decode_question(newer) == wire.Open("t")
    with pytest.raises(msgspec.ValidationError):
        wire.decode_question(msgspec.msgpack.encode({"type": "added_later"}))
