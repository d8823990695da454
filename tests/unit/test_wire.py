"""The fabric's messages: they come back, and what is over a limit is refused. Damaged ones: tests/fuzz."""

from __future__ import annotations

import msgspec
import pytest

from vllm_fleet.core import limits
from vllm_fleet.wire import fabric as wire
from vllm_fleet.wire.names import DECODE_ERRORS

PROMPT = bytes(range(32))
HANDLE = wire.PoolHandle("tcp", "pool", (1, 2), b"x")
MESSAGES: tuple[wire.Question | wire.Answer, ...] = (
    wire.Describe(),
    wire.Follow("f"),
    wire.Open("t", PROMPT, "f"),
    wire.Open("t", PROMPT, "f", 3, 4),
    wire.Close("t", taken=True),
    wire.Close("t", taken=False, reader=3),
    wire.Read("g", "p", bytes(24)),
    wire.Ping(),
    wire.Description("e", 0, 1, {"dtype": "bf16"}, (wire.Shape(100, 128, 7),), (HANDLE,)),
    wire.Following(),
    wire.Opened((1, 2, 3), 40),
    wire.Progress((wire.Update("t", 3, (4,), 64), wire.Update("u", 0, (), 0, gone=True))),
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
        wire.Open("t" * (limits.ID_LEN_MAX + 1), PROMPT, "f"),
        wire.Open("", PROMPT, "f"),
        wire.Open("t", PROMPT[1:], "f"),
        wire.Open("t", PROMPT, ""),
        wire.Open("t", PROMPT, "f", reader=-1),
        wire.Open("t", PROMPT, "f", reader=limits.RANKS_MAX),
        wire.Open("t", PROMPT, "f", readers=0),
        wire.Open("t", PROMPT, "f", readers=limits.RANKS_MAX + 1),
        wire.Close("t", taken=True, reader=-1),
        wire.Follow(""),
        wire.Read("g", "p", b""),
        wire.Read("g", "p", bytes(wire.RUN_BYTES * (limits.RUNS_MAX + 1))),
    ],
    ids=[
        "long id",
        "no id",
        "short digest",
        "no follower",
        "reader below 0",
        "reader too high",
        "no readers",
        "many readers",
        "closer below 0",
        "no name",
        "no runs",
        "many runs",
    ],
)
def test_what_is_over_a_limit_is_refused(too_much: wire.Question) -> None:
    with pytest.raises(msgspec.ValidationError):
        wire.decode_question(wire.encode(too_much))


@pytest.mark.parametrize(
    "too_much",
    [
        wire.Opened((0,) * (limits.BLOCKS_MAX + 1), 0),
        wire.Opened((-1,), 0),
        wire.Opened((), -1),
        wire.Progress((wire.Update("t", -1, (), 0),)),
        wire.Progress((wire.Update("t", 0, (0,) * (limits.BLOCKS_MAX + 1), 0),)),
    ],
    ids=["many blocks", "block below 0", "ready below 0", "first below 0", "many blocks told"],
)
def test_answers_over_a_limit_are_refused(too_much: wire.Answer) -> None:
    with pytest.raises(msgspec.ValidationError):
        wire.decode_answer(wire.encode(too_much))


def test_unknown_fields_are_ignored_and_unknown_tags_refused() -> None:
    known = {"type": "open", "transfer": "t", "prompt": PROMPT, "follower": "f"}
    newer = msgspec.msgpack.encode({**known, "added_later": 1})
    assert wire.decode_question(newer) == wire.Open("t", PROMPT, "f")
    with pytest.raises(msgspec.ValidationError):
        wire.decode_question(msgspec.msgpack.encode({"type": "added_later"}))
