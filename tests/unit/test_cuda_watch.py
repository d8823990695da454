"""cuda_ipc without a GPU: noticing that a peer hangs up, and saying why a pool cannot be registered."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from vllm_fleet.core.errors import LinkError
from vllm_fleet.fabric import transports
from vllm_fleet.fabric.contract import KVPool
from vllm_fleet.fabric.endpoint import Endpoint
from vllm_fleet.fabric.transports.cuda.watch import Hangups, hung_up
from vllm_fleet.net import sockets
from vllm_fleet.net.channel import Credentials


@pytest.fixture
def hangups() -> Iterator[Hangups]:
    before = threading.active_count()
    watching = Hangups("watch")
    yield watching
    watching.close()
    watching.close()
    assert threading.active_count() == before


def connected() -> tuple[socket.socket, socket.socket]:
    listener = sockets.listen("127.0.0.1", 0, setting="test")
    ours = socket.create_connection(listener.getsockname())
    theirs, _ = listener.accept()
    listener.close()
    return ours, theirs


@pytest.mark.parametrize("how", ["close", "shutdown"])
def test_a_hangup_is_told_once_even_behind_unread_bytes(hangups: Hangups, how: str) -> None:
    told = [threading.Event() for _ in range(3)]
    times = [0, 0, 0]
    pairs = [connected() for _ in range(3)]

    def tell(index: int) -> None:
        times[index] += 1
        told[index].set()

    for index, (ours, _) in enumerate(pairs):
        hangups.watch(ours, lambda index=index: tell(index))  # type: ignore[misc]
    pairs[1][1].send(b"unread")
    if how == "close":
        pairs[1][1].close()
    else:
        pairs[1][1].shutdown(socket.SHUT_WR)
    assert told[1].wait(10)
    assert hung_up(pairs[1][0])
    assert not hung_up(pairs[0][0])
    pairs[0][1].close()
    assert told[0].wait(10)
    hangups.forget(pairs[2][0])
    pairs[2][1].close()
    fourth = connected()
    last = threading.Event()
    hangups.watch(fourth[0], last.set)
    fourth[1].close()
    assert last.wait(10)
    assert times == [1, 1, 0]
    for ours, theirs in (*pairs, fourth):
        ours.close()
        theirs.close()
    assert hung_up(pairs[0][0])


def test_nothing_is_told_after_close() -> None:
    watching = Hangups("watch")
    ours, theirs = connected()
    told = threading.Event()
    watching.watch(ours, told.set)
    watching.close()
    watching.watch(ours, told.set)
    theirs.close()
    assert not told.wait(0.05)
    ours.close()


def test_a_pool_in_cpu_memory_is_refused_with_what_to_do() -> None:
    endpoint = Endpoint(sockets.listen("127.0.0.1", 0, setting="test"), Credentials("test", bytes(32)))
    endpoint.start()
    transport = transports.load("cuda_ipc")(endpoint)
    with pytest.raises(LinkError, match="use cma or tcp"):
        transport.register(KVPool(()))
    transport.withdraw()
    transport.close()
    endpoint.close()
