"""A load as it comes in: which blocks can be copied at which moment."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_fleet.connector.intake import Intake, Job, PeerLoad

BLOCK = 4


def intake(tokens: int, blocks: tuple[int, ...], skip: int = 0) -> Intake:
    load = PeerLoad("request", "t", "engine", bytes(32), tokens, BLOCK, blocks, skip, streamed=True)
    return Intake(Job(load), began=0.0, deadline=10.0)


def take(of: Intake) -> tuple[list[int], tuple[int, ...]]:
    """Copy what is ready."""
    theirs, ours = of.next_blocks()
    of.copied += len(ours)
    return theirs, ours


def test_whole_blocks_only_until_the_prompt_is_complete() -> None:
    load = intake(10, (70, 71, 72))
    assert take(load) == ([], ())
    load.learn(0, (5,), 3, now=1.0)
    assert take(load) == ([], ()), "the block is not full"
    load.learn(1, (6,), 4, now=2.0)
    assert take(load) == ([5], (70,))
    assert take(load) == ([], ())
    load.learn(2, (7,), 9, now=3.0)
    assert take(load) == ([6], (71,))
    assert (load.done, load.complete_at) == (False, None)
    load.learn(3, (), 10, now=4.0)
    assert load.complete_at == 4.0
    assert take(load) == ([7], (72,)), "the last one is not full, but the prompt is complete"
    assert load.done


def test_everything_at_once() -> None:
    load = intake(10, (70, 71, 72))
    load.learn(0, (5, 6, 7), 10, now=1.0)
    assert take(load) == ([5, 6, 7], (70, 71, 72))
    assert (load.done, load.complete_at) == (True, 1.0)


def test_what_decode_has_itself_is_skipped() -> None:
    load = intake(10, (71, 72), skip=1)
    load.learn(0, (5,), 4, now=1.0)
    assert take(load) == ([], ())
    load.learn(1, (6,), 8, now=2.0)
    assert take(load) == ([6], (71,))
    load.learn(2, (7,), 10, now=3.0)
    assert take(load) == ([7], (72,))
    assert load.done


def test_progress_without_its_blocks_is_not_copied() -> None:
    load = intake(10, (70, 71, 72))
    load.learn(0, (5,), 10, now=1.0)
    assert take(load) == ([5], (70,))
    assert load.complete_at is None
    load.learn(1, (6, 7), 10, now=2.0)
    assert take(load) == ([6, 7], (71, 72))
    assert load.complete_at == 2.0


def test_blocks_beyond_the_prompt_are_left_alone() -> None:
    load = intake(8, (70, 71))
    load.learn(0, (5, 6, 7, 8), 13, now=1.0)
    assert take(load) == ([5, 6], (70, 71))
    assert load.done


def test_progress_never_goes_back() -> None:
    load = intake(8, (70, 71))
    load.learn(0, (5, 6), 8, now=1.0)
    load.learn(2, (), 4, now=2.0)
    assert take(load) == ([5, 6], (70, 71))
    assert load.complete_at == 1.0


@pytest.mark.parametrize("first", [0, 1, 3])
def test_blocks_out_of_order_are_an_error(first: int) -> None:
    load = intake(16, (70, 71, 72, 73))
    load.learn(0, (5, 6), 8, now=1.0)
    with pytest.raises(ValueError, match=f"blocks from {first} on, when 2 are known"):
        load.learn(first, (9,), 12, now=2.0)
    assert take(load) == ([5, 6], (70, 71)), "nothing of it was taken"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_each_block_is_copied_once_to_its_place(data: st.DataObject) -> None:
    """Whatever the chunks: every block of ours gets the block of theirs at the same place, whole ones first."""
    tokens = data.draw(st.integers(1, 40))
    count = -(-tokens // BLOCK)
    skip = data.draw(st.integers(0, count - 1))
    theirs = data.draw(st.permutations(range(100, 100 + count)))
    load = intake(tokens, tuple(range(skip, count)), skip)
    copied: list[tuple[int, int]] = []
    known = ready = 0
    while ready < tokens or known < count:
        more = data.draw(st.integers(0, count - known))
        now_ready = data.draw(st.integers(ready, tokens))
        if not more and now_ready == ready:
            more, now_ready = count - known, tokens
        load.learn(known, theirs[known : known + more], now_ready, now=1.0)
        known, ready = known + more, now_ready
        sources, targets = take(load)
        copied += zip(sources, targets, strict=True)
        for _, ours in copied:
            assert (ours + 1) * BLOCK <= ready or ready == tokens
    assert copied == [(theirs[index], index) for index in range(skip, count)]
    assert load.done
    assert load.complete_at == 1.0
