"""A live endpoint, fed with damaged sessions over real connections."""

from __future__ import annotations

import contextlib
import random
import socket

import numpy as np

from tests.fuzz.targets import TOKEN, Owned, mutate, samples_of
from vllm_fleet.connector.jobs import HoldJob
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.net.channel import Channel, Credentials, connect
from vllm_fleet.wire import fabric as wire
from vllm_fleet.wire.auth import ClientHandshake
from vllm_fleet.wire.frames import HEADER, encode_frame
from vllm_fleet.wire.names import DECODE_ERRORS

HANG_S = 5.0
SESSION_INPUTS = 20


class Live:
    """An endpoint that serves a small pool over tcp, and what is done to it."""

    def __init__(self) -> None:
        self.owned = Owned()
        pool = self.owned.handles["tcp"].pool
        runs = np.array([[0, 0, 64], [1, 4032, 64]], "<i8").tobytes()
        good = (
            wire.Read("g", pool, runs),
            wire.Write("g", pool, runs),
            wire.Probe(pool),
            wire.Ping(),
            wire.Describe(),
            wire.Follow("f"),
            wire.Open("held", bytes(32), "f"),
            wire.Open("t", bytes(32), "f", 1, 2),
            wire.Close("held", taken=True),
            wire.Close("t", taken=False, reader=1),
        )
        self._samples = [*map(wire.encode, good), *samples_of(wire.Question)]
        hello = ClientHandshake(TOKEN, "f").start()
        self._streams = [
            encode_frame(hello),
            encode_frame(hello) * 2,
            HEADER.pack(2**32 - 1),
            b"GET / HTTP/1.1\r\n\r\n",
        ]

    def session(self, rng: random.Random) -> int:
        """Prove the token, then send damaged questions until one is malformed; how many the endpoint has read.

        AssertionError when the endpoint does not end the connection.
        """
        self.owned.holder.begin([], [], [HoldJob("held", "request", bytes(32), (0, 1), 8)])
        payloads = [mutate(rng, self._samples)]
        while _is_question(payloads[-1]) and len(payloads) < SESSION_INPUTS:
            payloads.append(mutate(rng, self._samples))
        with contextlib.closing(self._dial()) as channel:
            with contextlib.suppress(OSError):  # it closes as soon as it reads a malformed one
                channel.socket.sendall(b"".join(map(encode_frame, payloads)))
            _drain(channel.socket)
        return len(payloads)

    def stranger(self, rng: random.Random) -> int:
        """Send a damaged handshake."""
        address = ("127.0.0.1", self.owned.endpoint.port)
        with contextlib.closing(socket.create_connection(address, timeout=HANG_S)) as connected:
            with contextlib.suppress(OSError):
                connected.sendall(mutate(rng, self._streams))
            _drain(connected)
        return 1

    def serves(self) -> bool:
        """Whether the service goes on: a real read of the pool brings its bytes."""
        handle, own = self.owned.handles["tcp"], self.owned.array
        own[0, :64], runs = 7, np.array([[0, 0, 64]], "<i8").tobytes()
        deadline = Deadline.after(HANG_S, "test")
        with contextlib.closing(self._dial()) as channel:
            channel.send(wire.encode(wire.Read("g", handle.pool, runs)), deadline)
            if wire.decode_answer(channel.receive(deadline)) != wire.Reading(64):
                return False
            moved = bytes(channel.receive_exactly(64, deadline))
            return moved == bytes([7]) * 64 and wire.decode_answer(channel.receive(deadline)) == wire.Moved(64)

    def _dial(self) -> Channel:
        return connect("127.0.0.1", self.owned.endpoint.port, Credentials("f", TOKEN), Deadline.after(HANG_S, "test"))

    def close(self) -> None:
        self.owned.close()


def _is_question(payload: bytes) -> bool:
    try:
        wire.decode_question(payload)
    except DECODE_ERRORS:
        return False
    return True


def _drain(connected: socket.socket) -> None:
    """Read until the endpoint has closed; we have said all."""
    connected.settimeout(HANG_S)
    with contextlib.suppress(OSError):
        connected.shutdown(socket.SHUT_WR)
    try:
        while connected.recv(65536):
            pass
    except TimeoutError:
        raise AssertionError(f"the endpoint kept a connection for {HANG_S} s that had ended") from None
    except OSError:
        pass
