"""Connections that end while a thread uses them: always a PeerGone or a plain end, never a bare OSError."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import PeerGone
from vllm_fleet.net.channel import Channel
from vllm_fleet.net.scatter import receive_runs, send_runs


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    one, other = socket.socketpair()
    with one, other:
        yield Channel(one, "other"), Channel(other, "one")


def soon() -> Deadline:
    return Deadline.after(2, "test")


def test_waiting_on_a_connection_closed_by_another_thread_is_its_end(pair: tuple[Channel, Channel]) -> None:
    pair[0].close()
    assert pair[0].receive_idle() is None


def test_using_a_closed_connection_says_so(pair: tuple[Channel, Channel]) -> None:
    one, _ = pair
    one.close()
    buffer = np.zeros(8, np.uint8)
    runs = np.array([buffer.ctypes.data], np.int64), np.array([8], np.int64)
    with pytest.raises(PeerGone):
        one.send(b"x", soon())
    with pytest.raises(PeerGone):
        one.receive(soon())
    with pytest.raises(PeerGone):
        send_runs(one.socket, *runs, 1.0, "other")
    with pytest.raises(PeerGone):
        receive_runs(one.socket, *runs, 1.0, "other")
    assert not one.is_open()


def test_a_blocked_thread_wakes_when_the_connection_is_aborted(pair: tuple[Channel, Channel]) -> None:
    one, other = pair
    ended: list[object] = []
    waiting = threading.Thread(target=lambda: ended.append(one.receive_idle()))
    waiting.start()
    assert one.is_open()
    one.abort()
    waiting.join(5)
    assert ended == [None]
    assert not other.is_open()


def test_scattered_bytes_arrive_in_order_through_small_buffers(pair: tuple[Channel, Channel]) -> None:
    one, other = pair
    rng = np.random.default_rng(3)
    source = rng.integers(0, 256, 3 << 20, np.uint8)
    target = np.zeros_like(source)
    nbytes = rng.multinomial(len(source) - 3000, np.ones(3000) / 3000).astype(np.int64) + 1
    starts = np.cumsum(nbytes) - nbytes
    order = rng.permutation(len(nbytes))
    sizes = nbytes[order]
    sender = threading.Thread(
        target=send_runs, args=(one.socket, source.ctypes.data + starts[order], sizes, 5.0, "other")
    )
    sender.start()
    receive_runs(other.socket, target.ctypes.data + starts[order], sizes, 5.0, "one")
    sender.join(5)
    assert (source == target).all()


def test_a_peer_that_stops_reading_or_sending_is_given_up(pair: tuple[Channel, Channel]) -> None:
    one, other = pair
    memory = np.zeros(64 << 20, np.uint8)
    runs = np.array([memory.ctypes.data], np.int64), np.array([len(memory)], np.int64)
    with pytest.raises(PeerGone, match=r"no byte moved .* for 0\.2 s"):
        send_runs(one.socket, *runs, 0.2, "other")
    with pytest.raises(PeerGone, match=r"no byte moved"):
        receive_runs(one.socket, *runs, 0.2, "other")
    other.abort()
    with pytest.raises(PeerGone, match=r"closed|broke"):
        receive_runs(one.socket, *runs, 0.2, "other")
