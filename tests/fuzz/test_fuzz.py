"""A short run of what `make fuzz` does at length: declared errors only, no hang, nothing left, the service goes on."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.contract.harness import eventually
from tests.fuzz.live import Live
from tests.fuzz.targets import Owned, Target, codecs, feed, mutate

CODECS = {target.name: target for target in codecs()}


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=150, deadline=None, database=None)
@given(rng=st.randoms(use_true_random=False))
def test_damaged_messages(name: str, rng: random.Random) -> None:
    target = CODECS[name]
    feed(target, mutate(rng, target.samples))


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=50, deadline=None, database=None)
@given(garbage=st.binary(max_size=300))
def test_garbage(name: str, garbage: bytes) -> None:
    feed(CODECS[name], garbage)


@pytest.mark.parametrize("name", CODECS)
def test_deep_nesting_and_length(name: str) -> None:
    for received in (b"\x91" * 200_000, b"\x81" * 200_000, b"\xc4" * 100_000, bytes(1 << 20)):
        assert feed(CODECS[name], received) != "taken" or name == "frames"


@pytest.fixture
def tidy() -> Iterator[None]:
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    yield
    eventually("a thread was left behind", lambda: threading.active_count() <= before[0])
    eventually("a file descriptor was left behind", lambda: len(os.listdir("/proc/self/fd")) <= before[1])


def test_questions_about_registered_memory_and_damaged_handles(tidy: None) -> None:
    owned, rng = Owned(), random.Random(1)
    try:
        for target in owned.targets():
            outcomes = {feed(target, mutate(rng, target.samples)) for _ in range(400)}
            assert outcomes - {"taken"}
    finally:
        owned.close()


def test_a_live_endpoint_goes_on(tidy: None) -> None:
    live, rng = Live(), random.Random(2)
    try:
        assert live.serves()
        assert sum(live.session(rng) for _ in range(150)) > 150
        assert sum(live.stranger(rng) for _ in range(50)) == 50
        assert live.serves()
    finally:
        live.close()


def test_an_undeclared_error_would_be_found() -> None:
    def read(received: bytes) -> None:
        raise KeyError(received)

    with pytest.raises(AssertionError, match="KeyError for 6162"):
        feed(Target("broken", [b"x"], read, (ValueError,)), b"ab")
