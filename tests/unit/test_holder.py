"""Prefill's half of a worker, over real connections: a decode may come before the hold is known, and gives back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from vllm_fleet.connector.holder import Holder
from vllm_fleet.connector.jobs import HoldJob
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.fabric.contract import KVPool, Region
from vllm_fleet.fabric.endpoint import Endpoint, ask
from vllm_fleet.net import sockets
from vllm_fleet.net.channel import Channel, Credentials, connect
from vllm_fleet.wire import fabric as wire

CREDENTIALS = Credentials("test", bytes(32))


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


def deadline() -> Deadline:
    return Deadline.after(5, "test")


@pytest.fixture
def owner() -> Iterator[Owner]:
    made = Owner()
    yield made
    made.endpoint.close()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as held:
        yield held


def channel(owner: Owner, stack: ExitStack) -> Channel:
    made = owner.connect()
    stack.callback(made.close)
    return made


def test_open_before_the_hold_is_known(owner: Owner, stack: ExitStack) -> None:
    peer = channel(owner, stack)
    later = threading.Timer(0.1, owner.holder.hold, [[HoldJob("t", "r", (1, 2))]])
    later.start()
    assert ask(peer, wire.Open("t"), deadline()) == wire.Opened((1, 2))
    assert ask(peer, wire.Close("t", taken=True), deadline()) == wire.Closed(valid=True)
    assert owner.holder.take_ended() == {"r"}
    later.join()


def test_giving_up_before_the_hold_is_known(owner: Owner, stack: ExitStack) -> None:
    peer = channel(owner, stack)
    later = threading.Timer(0.05, owner.holder.hold, [[HoldJob("t", "r", (1, 2))]])
    later.start()
    assert ask(peer, wire.Close("t", taken=False), deadline()) == wire.Closed(valid=True)
    assert owner.holder.take_ended() == {"r"}
    assert owner.holder.pins == 0
    later.join()


def test_a_lost_connection_gives_back_what_it_had_open(owner: Owner, stack: ExitStack) -> None:
    owner.holder.hold([HoldJob("t", "r", (1,)), HoldJob("u", "s", (2,))])
    peer = channel(owner, stack)
    ask(peer, wire.Open("t"), deadline())
    peer.close()
    with owner.changed:
        assert owner.changed.wait_for(lambda: owner.holder.has_ended, 5)
    assert owner.holder.take_ended() == {"r"}
    assert owner.holder.pins == 1


def test_reads_are_granted_for_blocks_of_open_transfers_only(owner: Owner, stack: ExitStack) -> None:
    owner.holder.hold([HoldJob("t", "r", (1, 2))])

    def granted(grant: str, offset: int, nbytes: int) -> bool:
        return owner.holder.grants(grant, np.array([0]), np.array([offset]), np.array([nbytes]))

    assert not granted("t", 100, 100)  # held, but nobody has opened it
    ask(channel(owner, stack), wire.Open("t"), deadline())
    assert granted("t", 100, 200)
    assert not granted("t", 99, 2)
    assert not granted("t", 100, 201)
    assert not granted("u", 100, 1)
