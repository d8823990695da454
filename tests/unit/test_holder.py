"""Prefill's half of a worker, over real connections: it tells what is ready, to whom, and when the blocks are gone."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from vllm_fleet.connector.holder import Holder
from vllm_fleet.connector.jobs import GrowJob, HoldJob
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import PeerGone
from vllm_fleet.fabric.contract import KVPool, Region
from vllm_fleet.fabric.endpoint import Endpoint, ask
from vllm_fleet.net import sockets
from vllm_fleet.net.channel import Channel, Credentials, connect
from vllm_fleet.wire import fabric as wire

CREDENTIALS = Credentials("test", bytes(32))
PROMPT, OTHER = b"p" * 32, b"o" * 32


class Owner:
    """A holder behind an endpoint."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.endpoint = Endpoint(sockets.listen("127.0.0.1", 0, setting="test"), CREDENTIALS)
        self.holder = Holder(self.endpoint, self.changed, lease_s=30.0, hold_s=60.0)
        self.holder.use_pool(KVPool((Region(0, 400, 100, 100, 4),)))
        self.endpoint.start()

    def connect(self) -> Channel:
        return connect(self.endpoint.host, self.endpoint.port, CREDENTIALS, deadline())

    def grow(self, blocks: tuple[int, ...], ready: int = 0, transfer: str = "t") -> GrowJob:
        """A step's further blocks, before the step has run."""
        job = GrowJob(transfer, f"request of {transfer}", PROMPT, blocks, ready)
        self.holder.begin([job], [], [])
        return job

    def step(self, blocks: tuple[int, ...], ready: int, transfer: str = "t") -> None:
        """A step, and its KV is in memory."""
        self.holder.publish([self.grow(blocks, ready, transfer)])

    def hold(self, blocks: tuple[int, ...], tokens: int, transfer: str = "t") -> None:
        self.holder.begin([], [], [HoldJob(transfer, f"request of {transfer}", PROMPT, blocks, tokens)])

    def revoke(self, transfer: str = "t") -> None:
        self.holder.begin([], [transfer], [])

    def ended(self) -> set[str]:
        """Requests whose pins ended; waits for one."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.holder.has_ended, 5)
        return self.holder.take_ended()


class Reader:
    """A decode worker's two connections."""

    def __init__(self, owner: Owner, name: str) -> None:
        self.name, self.channel, self.heard = name, owner.connect(), owner.connect()
        assert ask(self.heard, wire.Follow(name), deadline()) == wire.Following()

    def open(self, transfer: str = "t", prompt: bytes = PROMPT, reader: int = 0, readers: int = 1) -> wire.Answer:
        return ask(self.channel, wire.Open(transfer, prompt, self.name, reader, readers), deadline())

    def shut(self, transfer: str = "t", *, taken: bool = True, reader: int = 0) -> bool:
        closed = ask(self.channel, wire.Close(transfer, taken, reader), deadline())
        assert isinstance(closed, wire.Closed)
        return closed.valid

    def told(self) -> tuple[wire.Update, ...]:
        """What it is told next."""
        progress = wire.decode_answer(self.heard.receive(deadline()))
        assert isinstance(progress, wire.Progress)
        return progress.updates

    def told_all(self) -> None:
        """Take what it is told until the connection ends."""
        while True:
            self.heard.receive(deadline())

    def told_nothing(self) -> bool:
        """Whether nothing has been told that was not taken; pushes come before the next answer on loopback."""
        assert ask(self.channel, wire.Ping(), deadline()) == wire.Pong()
        return not self.heard.has_arrived()

    def close(self) -> None:
        self.channel.close()
        self.heard.close()


def deadline() -> Deadline:
    return Deadline.after(5, "test")


def gone(transfer: str = "t") -> wire.Update:
    return wire.Update(transfer, 0, (), 0, gone=True)


@pytest.fixture
def owner() -> Iterator[Owner]:
    made = Owner()
    yield made
    made.endpoint.close()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as held:
        yield held


@pytest.fixture
def reader(owner: Owner, stack: ExitStack) -> Reader:
    return another(owner, stack, "decode")


def another(owner: Owner, stack: ExitStack, name: str) -> Reader:
    made = Reader(owner, name)
    stack.callback(made.close)
    return made


def test_a_finished_request(owner: Owner, reader: Reader) -> None:
    owner.hold((1, 2), 8)
    assert (owner.holder.pins, owner.holder.blocks) == (1, 2)
    assert reader.open() == wire.Opened((1, 2), 8)
    assert reader.shut()
    assert owner.ended() == {"request of t"}
    assert (owner.holder.pins, owner.holder.blocks) == (0, 0)
    assert reader.told_nothing()


def test_each_publish_tells_exactly_the_new_blocks(owner: Owner, reader: Reader) -> None:
    owner.step((7, 3), 8)
    assert reader.open() == wire.Opened((7, 3), 8)
    job = owner.grow((1,), 12)
    assert reader.told_nothing(), "its KV is not computed yet"
    owner.holder.publish([job])
    assert reader.told() == (wire.Update("t", 2, (1,), 12),)
    owner.step((), 14)
    assert reader.told() == (wire.Update("t", 3, (), 14),)
    owner.step((5, 6), 22)
    assert reader.told() == (wire.Update("t", 3, (5, 6), 22),)
    assert owner.holder.blocks == 0, "a running request's blocks are the engine's"
    assert reader.shut()
    assert owner.holder.take_ended() == set(), "its request has not finished"
    owner.hold((7, 3, 1, 5, 6), 22)
    assert owner.holder.take_ended() == {"request of t"}


def test_open_before_it_has_begun(owner: Owner, reader: Reader) -> None:
    assert reader.open() == wire.Opened((), 0)
    assert owner.holder.pins == 0
    owner.hold((1, 2), 8)
    assert reader.told() == (wire.Update("t", 0, (1, 2), 8),)
    assert reader.shut()
    assert owner.ended() == {"request of t"}


def test_giving_up_before_it_has_begun(owner: Owner, reader: Reader) -> None:
    assert not reader.shut(taken=False)
    owner.hold((1, 2), 8)
    assert owner.ended() == {"request of t"}
    assert owner.holder.pins == 0


def test_one_step_of_many_transfers_is_one_message(owner: Owner, reader: Reader) -> None:
    for name in "abc":
        assert reader.open(name) == wire.Opened((), 0)
    jobs = [owner.grow((index,), 4, name) for index, name in enumerate("abc")]
    owner.holder.publish(jobs)
    assert sorted(update.transfer for update in reader.told()) == ["a", "b", "c"]
    assert reader.told_nothing()


def test_a_revoked_transfer_is_told_once_and_closing_it_is_not_valid(owner: Owner, reader: Reader) -> None:
    owner.step((1,), 4)
    reader.open()
    owner.revoke()
    assert reader.told() == (gone(),)
    assert not reader.shut()
    assert reader.open() == wire.Denied("unknown_transfer")
    assert reader.told_nothing()
    assert owner.holder.take_ended() == set()


def test_who_has_closed_hears_no_more(owner: Owner, reader: Reader) -> None:
    owner.step((1,), 4)
    reader.open()
    assert reader.shut()
    owner.step((2,), 8)
    owner.revoke()
    assert reader.told_nothing()


def test_two_readers_of_one_transfer(owner: Owner, reader: Reader, stack: ExitStack) -> None:
    second = another(owner, stack, "second")
    owner.step((1,), 4)
    assert reader.open(reader=0, readers=2) == wire.Opened((1,), 4)
    owner.step((2,), 8)
    assert reader.told() == (wire.Update("t", 1, (2,), 8),)
    assert second.open(reader=1, readers=2) == wire.Opened((1, 2), 8)
    owner.step((3,), 12)
    assert reader.told() == second.told() == (wire.Update("t", 2, (3,), 12),)
    owner.hold((1, 2, 3), 12)
    assert reader.told() == second.told() == (wire.Update("t", 3, (), 12),)
    assert reader.shut(reader=0)
    assert owner.holder.take_ended() == set()
    assert second.shut(reader=1)
    assert owner.ended() == {"request of t"}


def test_the_other_reader_hears_when_one_is_lost(owner: Owner, reader: Reader, stack: ExitStack) -> None:
    second = another(owner, stack, "second")
    owner.hold((1,), 4)
    reader.open(reader=0, readers=2)
    second.open(reader=1, readers=2)
    reader.close()
    assert second.told() == (gone(),)
    assert owner.ended() == {"request of t"}


def test_the_other_reader_hears_when_one_is_lost_while_it_grows(owner: Owner, reader: Reader, stack: ExitStack) -> None:
    second = another(owner, stack, "second")
    owner.step((1,), 4)
    reader.open(reader=0, readers=2)
    second.open(reader=1, readers=2)
    reader.close()
    assert second.told() == (gone(),)


def test_another_prompt_is_denied(owner: Owner, reader: Reader) -> None:
    owner.step((1,), 4)
    assert reader.open(prompt=OTHER) == wire.Denied("other_prompt")
    assert not granted(owner, "t", 100, 100)
    assert reader.open() == wire.Opened((1,), 4)


def test_who_expected_another_prompt_is_told_that_it_is_gone(owner: Owner, reader: Reader) -> None:
    assert reader.open(prompt=OTHER) == wire.Opened((), 0)
    owner.step((1,), 4)
    assert reader.told() == (gone(),)
    assert not granted(owner, "t", 100, 100)
    assert not reader.shut()
    owner.hold((1,), 4)
    assert owner.ended() == {"request of t"}
    assert reader.told_nothing()


def test_open_needs_a_follower_of_that_name(owner: Owner, reader: Reader, stack: ExitStack) -> None:
    owner.hold((1,), 4)
    stranger = owner.connect()
    stack.callback(stranger.close)
    answer = ask(stranger, wire.Open("t", PROMPT, "nobody"), deadline())
    assert isinstance(answer, wire.Denied)
    assert answer.reason == "unsupported"
    another(owner, stack, "second")
    assert reader.open() == wire.Opened((1,), 4)
    changed = ask(reader.channel, wire.Open("t", PROMPT, "second"), deadline())
    assert isinstance(changed, wire.Denied), "a connection opens in one name"


def test_a_name_is_followed_once(owner: Owner, reader: Reader, stack: ExitStack) -> None:
    second = owner.connect()
    stack.callback(second.close)
    assert ask(second, wire.Follow(reader.name), deadline()) == wire.Denied("already_open")
    assert ask(second, wire.Follow("second"), deadline()) == wire.Following()
    assert ask(second, wire.Follow("third"), deadline()) == wire.Denied("already_open")


def test_an_open_transfer_is_denied_to_others(owner: Owner, reader: Reader, stack: ExitStack) -> None:
    owner.hold((1,), 4)
    reader.open()
    second = another(owner, stack, "second")
    assert second.open() == wire.Denied("already_open")
    assert not second.shut()
    assert reader.shut()


def test_a_lost_connection_gives_back_what_it_had_open(owner: Owner, reader: Reader) -> None:
    owner.hold((1,), 4)
    owner.hold((2,), 4, "u")
    reader.open()
    reader.channel.close()
    assert owner.ended() == {"request of t"}
    assert owner.holder.pins == 1


def test_a_follower_that_does_not_read_is_cut_off_and_keeps_nobody_waiting(
    owner: Owner, reader: Reader, stack: ExitStack
) -> None:
    second = another(owner, stack, "second")
    assert second.open("u") == wire.Opened((), 0)
    reader.open()
    blocks, began = tuple(range(60_000)), time.monotonic()
    for count in range(1, 400):  # some 200 KB each, until what the system takes in is full
        owner.step(blocks, count)
        if isinstance(ask(reader.channel, wire.Open("v", PROMPT, reader.name), deadline()), wire.Denied):
            break  # it follows no more
    else:
        raise AssertionError("it was never cut off")
    assert time.monotonic() - began < 10
    with pytest.raises(PeerGone):
        reader.told_all()
    owner.step((1,), 4, "u")
    assert second.told() == (wire.Update("u", 0, (1,), 4),)
    assert second.told_nothing()


def granted(owner: Owner, grant: str, offset: int, nbytes: int) -> bool:
    return owner.holder.grants(grant, np.array([0]), np.array([offset]), np.array([nbytes]))


def test_reads_are_granted_for_blocks_of_open_transfers_only(owner: Owner, reader: Reader) -> None:
    owner.step((1,), 4)
    assert not granted(owner, "t", 100, 100)  # it is there, but nobody has opened it
    reader.open()
    assert granted(owner, "t", 100, 100)
    assert not granted(owner, "t", 100, 200)
    owner.step((2,), 8)
    assert granted(owner, "t", 100, 200)
    assert not granted(owner, "t", 99, 2)
    assert not granted(owner, "t", 100, 201)
    assert not granted(owner, "u", 100, 1)
    owner.revoke()
    assert not granted(owner, "t", 100, 100)
