"""Texts and blocks together: what the router believes of caches, against what a cache like vLLM's holds."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_fleet.bench.mock_cache import Held, MockCache, block_hashes
from vllm_fleet.core.errors import Corrupt
from vllm_fleet.core.ids import InstanceName
from vllm_fleet.router.openai import Route, parse_request
from vllm_fleet.router.policies.facts import Facts
from vllm_fleet.router.policies.prefix import Prefix
from vllm_fleet.router.prefix.book import PrefixBook
from vllm_fleet.router.prefix.events import END, AllBlocksCleared, BlockRemoved, BlockStored, Sequence, parse
from vllm_fleet.router.prefix.subscriber import endpoints, run_subscriptions
from vllm_fleet.wire.control import Member

RELAXED = settings(deadline=None)  # a busy machine is no failure

A, B, C = InstanceName("a"), InstanceName("b"), InstanceName("c")
BLOCK = 64
"""Bytes of a block: 16 tokens of 4."""


class Idle:
    def load(self, name: str) -> float:
        return 0.0


class Busy:
    """Everybody but one is idle."""

    def __init__(self, name: str, requests: float) -> None:
        self._name, self._requests = name, requests

    def load(self, name: str) -> float:
        return self._requests if name == self._name else 0.0


def facts(prompt: str, **fields: Any) -> Facts:
    return Facts(parse_request(Route.COMPLETIONS, json.dumps({"prompt": prompt, **fields}).encode()), {})


def text(word: str, size: int) -> str:
    return (word * size)[:size]


def encode(events: list[dict[str, Any]]) -> bytes:
    return msgspec.msgpack.encode([0.0, events, 0])


class World:
    """A book, and caches whose events reach it at once."""

    def __init__(self, blocks: int = 1000, live: tuple[InstanceName, ...] = (A, B, C)) -> None:
        self.book = PrefixBook("r")
        self.caches = {name: MockCache(blocks, 16) for name in (A, B, C)}
        for name in live:
            self.book.follow(name, live=True)

    def run(self, name: InstanceName, prompt: str, answer: str = "", **fields: Any) -> Held:
        """A request from its choice to its end."""
        asked = facts(prompt, **fields)
        self.book.sent(name, asked)
        cache = self.caches[name]
        held = cache.begin(b'"' + prompt.encode(), asked.label)
        for end in range(1, len(answer) + 1):
            cache.grow(held, b'"' + (prompt + answer[:end]).encode())
        cache.end(held)
        self.tell(name)
        return held

    def tell(self, name: InstanceName) -> None:
        cache = self.caches[name]
        self.book.take(name, parse(encode(cache.events)))
        cache.events.clear()

    def hits(self, prompt: str, **fields: Any) -> dict[str, int]:
        found = self.book.hits(facts(prompt, **fields), (A, B, C))
        return {str(name): size for name, size in found.items()}


def test_who_computed_a_prompt_holds_it_and_its_next_turn() -> None:
    world = World()
    prompt = text("turn one ", 1000)
    world.run(A, prompt, text("answer ", 200))
    assert set(world.hits(prompt)) == {A}
    assert world.hits(prompt + text("answer ", 200) + "and now")["a"] >= 1000
    assert world.hits(text("another ", 1000)) == {}


def test_what_is_evicted_is_not_believed_though_it_was_sent_there() -> None:
    world = World(blocks=20)
    prompt = text("first ", 1000)
    world.run(A, prompt)
    world.run(A, text("second ", 1200))
    assert world.hits(prompt).get("a", 0) <= 3 * BLOCK
    believer = World(blocks=20, live=())
    believer.run(A, prompt)
    believer.run(A, text("second ", 1200))
    assert believer.hits(prompt)["a"] == 1001, "without events nobody knows better"


def test_without_events_the_size_an_instance_tells_bounds_what_is_believed() -> None:
    world = World(live=())
    world.run(A, text("first ", 1000))
    world.run(A, text("second ", 1000))
    world.book.resize(A, 1200 // 4)
    assert world.hits(text("first ", 1000)).get("a", 0) == 0
    assert world.hits(text("second ", 1000))["a"] == 1001


def test_a_prefix_sent_moments_ago_is_believed_before_any_event() -> None:
    world = World()
    shared = text("system ", 2000)
    world.book.sent(B, facts(shared + "one"))
    assert world.hits(shared + "two")["b"] == len(shared) + 1


def test_equal_blocks_of_two_instances_are_the_same_blocks() -> None:
    world = World()
    shared = text("system ", 2000)
    world.run(A, shared + text("one ", 300))
    world.run(B, shared + text("two ", 300))
    found = world.hits(shared + text("three ", 300))
    assert found["a"] == pytest.approx(found["b"], abs=BLOCK)
    world.caches[A].clear()
    world.tell(A)
    assert set(world.hits(shared + text("three ", 300))) == {B}


def test_salts_and_adapters_share_nothing() -> None:
    world = World()
    prompt = text("secret ", 1000)
    world.run(A, prompt, cache_salt="alice")
    assert world.hits(prompt, cache_salt="bob") == {}
    assert world.hits(prompt) == {}
    assert set(world.hits(prompt, cache_salt="alice")) == {A}


def test_who_left_or_began_anew_holds_nothing_and_its_place_is_given_to_nobody_by_mistake() -> None:
    world = World()
    prompt = text("first ", 1000)
    world.run(A, prompt)
    world.book.forget(A)
    assert world.hits(prompt) == {}
    world.book.bit(InstanceName("newcomer"))
    assert world.book.hits(facts(prompt), (InstanceName("newcomer"),)) == {}


def test_labels_are_the_routers_own_and_differ() -> None:
    world = World()
    one, other = facts(text("x", 100)), facts(text("x", 100))
    world.book.sent(A, one)
    world.book.sent(B, other)
    assert one.label != other.label
    assert one.label is not None
    first = one.label
    world.book.sent(C, one)
    assert one.label == first, "prefill and decode of one request are told the same"
    quiet = World(live=())
    unheard = facts("x")
    quiet.book.sent(A, unheard)
    assert unheard.label is None, "without events instances are told nothing"


@RELAXED
@given(
    st.lists(st.tuples(st.sampled_from([A, B]), st.integers(0, 3), st.integers(0, 3), st.integers(1, 30)), max_size=25)
)
def test_belief_is_near_the_truth_whatever_was_evicted(
    requests: list[tuple[InstanceName, int, int, int]],
) -> None:
    """Prompts share beginnings in many ways, in caches of 40 blocks."""
    world = World(blocks=40)
    prompts = [text(f"s{s} ", 900) + text(f"u{u} ", size * 40) for _, s, u, size in requests]
    for (name, *_), prompt in zip(requests, prompts, strict=True):
        world.run(name, prompt)
    for prompt in prompts:
        raw = b'"' + prompt.encode()
        for name in (A, B):
            cached = 0
            for one in block_hashes(raw, BLOCK):
                if not world.caches[name].has(one):
                    break
                cached += BLOCK
            believed = world.hits(prompt).get(str(name), 0)
            # Exact at the ends of texts; where two part in between, their blocks are counted by bytes.
            assert abs(believed - cached) <= 2 * BLOCK, (name, believed, cached)


# The policy --------------------------------------------------------------------------------------------------------


def test_the_prefix_wins_until_the_queue_costs_more() -> None:
    world = World()
    policy = Prefix(world.book, load_tokens=100)
    prompt = text("hot ", 4000)
    world.run(B, prompt)
    asked = facts(prompt + "go on")
    assert policy.choose((A, B, C), Idle(), asked) == B
    assert policy.held(B, asked) == pytest.approx(1.0, abs=0.02)
    assert policy.held(A, asked) == 0.0
    assert policy.choose((A, B, C), Busy("b", 9), facts(prompt + "go on")) == B
    assert policy.choose((A, B, C), Busy("b", 11), facts(prompt + "go on")) != B


def test_a_hot_prefix_spreads_instead_of_drowning_one_instance() -> None:
    book = PrefixBook("r")
    policy = Prefix(book, load_tokens=256)
    running: dict[str, int] = {"a": 0, "b": 0, "c": 0}

    class Live:
        def load(self, name: str) -> float:
            return running[name]

    for number in range(90):  # all at once, none ends
        asked = facts(text("hot ", 8000) + str(number))
        chosen = policy.choose((A, B, C), Live(), asked)
        assert chosen is not None
        policy.sent(chosen, asked)
        running[chosen] += 1
    assert max(running.values()) - min(running.values()) <= 8000 / 4 / 256 + 1


# Events ------------------------------------------------------------------------------------------------------------


def test_events_are_decoded_and_what_is_not_needed_is_skipped() -> None:
    cache = MockCache(2, 16)
    cache.end(cache.begin(b"x" * 2 * BLOCK, "l"))
    cache.end(cache.begin(b"y" * BLOCK))
    cache.clear()
    stored, removed, again, cleared = parse(encode(cache.events))
    assert isinstance(stored, BlockStored)
    assert (len(stored.block_hashes), stored.session_id, stored.parent_block_hash) == (2, "l", None)
    assert isinstance(again, BlockStored) or isinstance(removed, BlockStored)
    assert any(isinstance(one, BlockRemoved) for one in (removed, again))
    assert isinstance(cleared, AllBlocksCleared)


@pytest.mark.parametrize(
    "payload",
    [b"", b"\xc1", b"\x93", encode([])[:-1], msgspec.msgpack.encode([0.0, [{"type": "Other"}]]), b"\x91" * 5000],
)
def test_what_is_no_event_is_refused_by_name(payload: bytes) -> None:
    with pytest.raises(Corrupt):
        parse(payload)


@RELAXED
@given(st.binary(max_size=200))
def test_no_bytes_do_worse(payload: bytes) -> None:
    try:
        parse(payload)
    except Corrupt:
        return


def test_numbers_tell_what_was_lost() -> None:
    sequence = Sequence()
    assert [sequence.judge(0), sequence.judge(1)] == ["next", "gap"]
    sequence.took(4)
    assert [sequence.judge(4), sequence.judge(5), sequence.judge(7)] == ["old", "next", "gap"]


# The subscriber, over real sockets ---------------------------------------------------------------------------------


class Publisher:
    """An instance's two sockets, as vLLM 0.32 runs them."""

    def __init__(self, context: zmq.asyncio.Context, folder: str, keep: int) -> None:
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=keep)
        self._number = 0
        publish, replay = endpoints(folder, "a")
        self._pub, self._replay = context.socket(zmq.PUB), context.socket(zmq.ROUTER)
        self._pub.bind(publish)
        self._replay.bind(replay)

    async def answer(self) -> None:
        while True:
            client, _, start = await self._replay.recv_multipart()
            for number, payload in list(self._kept):
                if number >= int.from_bytes(start, "big"):
                    await self._replay.send_multipart([client, b"", b"", number.to_bytes(8, "big"), payload])
            await self._replay.send_multipart([client, b"", b"", END, b""])

    async def publish(self, payload: bytes, *, lose: bool = False) -> None:
        number, self._number = self._number, self._number + 1
        if not lose:
            await self._pub.send_multipart([b"", number.to_bytes(8, "big"), payload])
        self._kept.append((number, payload))


def stored(*hashes: int, before: int | None = None) -> bytes:
    event = {"type": "BlockStored", "block_hashes": hashes, "parent_block_hash": before, "block_size": 16}
    return encode([event])


async def until(done: Any) -> None:
    async with asyncio.timeout(10):
        while not done():  # noqa: ASYNC110  the book has no event to wait for
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("keep", [100, 1])
async def test_events_before_and_after_and_lost_ones(tmp_path: Path, keep: int) -> None:
    folder = str(tmp_path)
    book, context = PrefixBook("r"), zmq.asyncio.Context()
    publisher = Publisher(context, folder, keep)
    await publisher.publish(stored(1, 2))
    await publisher.publish(stored(3, before=2))
    member = Member("a", "both", "http://a:1", 1, "a-1", 1, "ready")
    tasks = [
        asyncio.create_task(publisher.answer()),
        asyncio.create_task(run_subscriptions(book, lambda: [member], folder)),
    ]
    bit = book.bit(A)
    try:
        if keep == 100:  # all that was published before anybody listened is asked for
            await until(lambda: book.blocks.held_by(bit) == 3)
        else:
            await until(lambda: book.live(A) and book.blocks.orphans == 1)
        await publisher.publish(stored(10))
        await until(lambda: 10 in book.blocks._known)
        await publisher.publish(stored(11), lose=True)
        await publisher.publish(stored(12), lose=True)
        await publisher.publish(stored(13))
        await until(lambda: 13 in book.blocks._known)
        known = set(book.blocks._held[bit])
        if keep == 100:
            assert known == {1, 2, 3, 10, 11, 12, 13}, "what was lost on the way is asked for"
        else:
            assert known == {13}, "what cannot be had any more leaves nothing believed from before"
        member = Member("a", "both", "http://a:1", 1, "a-2", 2, "ready")
        await publisher.publish(b"rubbish")
        await until(lambda: book.blocks.held_by(bit) == 0)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        context.destroy(linger=0)
