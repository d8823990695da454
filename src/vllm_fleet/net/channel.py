"""Authenticated, framed, blocking connections between workers, and the server that accepts them.

Used from threads: the fabric's data path is system calls that release the interpreter's lock, and needs no event loop.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from vllm_fleet.core import limits, log
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import Corrupt, FleetError, LinkError, PeerGone
from vllm_fleet.net import sockets
from vllm_fleet.wire.auth import ClientHandshake, ServerHandshake
from vllm_fleet.wire.frames import HEADER, encode_frame, frame_length

PREAUTH_SETTING = "limits.PREAUTH_S"
FRAME_S = 30.0
ACCEPT_PAUSE_S = 0.1
FRAME_SETTING = "net.channel.FRAME_S"


@dataclass(frozen=True)
class Credentials:
    """What a process needs to prove that it belongs to a fleet; never printed."""

    fleet: str
    token: bytes

    def __repr__(self) -> str:
        return f"Credentials(fleet={self.fleet!r})"


class Channel:
    """One connection; frames in order, each with a deadline. Not for use by two threads at once, but for close()."""

    def __init__(self, connected: socket.socket, peer: str) -> None:
        self.socket = connected
        self.peer = peer

    def send(self, payload: bytes, deadline: Deadline) -> None:
        """Send one frame. Raises PeerGone when the connection broke, DeadlineExceeded when the peer does not read."""
        self._arm(deadline, "reading a message")
        try:
            self.socket.sendall(encode_frame(payload))
        except TimeoutError as error:
            raise deadline.error(self.peer, "reading a message") from error
        except OSError as error:
            raise PeerGone(f"the connection to {self.peer} broke: {error.strerror or error}") from error

    def push(self, payload: bytes) -> bool:
        """Send one frame without waiting; False where the peer is so far behind that it does not fit.

        The connection is of no use then: half a frame may be under way. For the thread that does not receive.
        """
        frame = encode_frame(payload)
        try:
            return self.socket.send(frame, socket.MSG_DONTWAIT) == len(frame)
        except OSError:
            return False

    def receive(self, deadline: Deadline, bytes_max: int = limits.FRAME_BYTES_MAX) -> bytes:
        """Receive one frame. Raises PeerGone, DeadlineExceeded, or Corrupt when a longer frame is announced."""
        length = frame_length(bytes(self.receive_exactly(HEADER.size, deadline)), bytes_max)
        return bytes(self.receive_exactly(length, deadline))

    def receive_exactly(self, nbytes: int, deadline: Deadline) -> bytearray:
        """Receive exactly ``nbytes`` bytes."""
        received = bytearray(nbytes)
        view = memoryview(received)
        while view:
            self._arm(deadline, "answering")
            try:
                got = self.socket.recv_into(view)
            except TimeoutError as error:
                raise deadline.error(self.peer, "answering") from error
            except OSError as error:
                raise PeerGone(f"the connection to {self.peer} broke: {error.strerror or error}") from error
            if got == 0:
                raise PeerGone(f"{self.peer} closed the connection")
            view = view[got:]
        return received

    def receive_idle(self, bytes_max: int = limits.FRAME_BYTES_MAX) -> bytes | None:
        """The peer's next frame, however long it stays silent; None when it has left.

        Once a frame has begun the rest must follow within FRAME_S: a peer cannot hold half a frame here.
        """
        try:
            self.socket.settimeout(None)  # fails, too, where another thread has closed the connection meanwhile
            first = self.socket.recv(1)
        except OSError:
            return None
        if not first:
            return None
        deadline = Deadline.after(FRAME_S, FRAME_SETTING)
        header = first + bytes(self.receive_exactly(HEADER.size - 1, deadline))
        return bytes(self.receive_exactly(frame_length(header, bytes_max), deadline))

    def abort(self) -> None:
        """End the connection but keep its file descriptor: a thread blocked in it wakes with PeerGone and closes it."""
        with contextlib.suppress(OSError):  # not connected any more
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection; a thread blocked in it wakes with PeerGone. Safe to call twice."""
        self.abort()
        self.socket.close()

    def reset(self) -> None:
        """Close the connection in the middle of what the peer sends: it is told at once, whatever it is waiting for.

        After a plain close() a peer whose window is full learns of it only from its own probes, seconds later.
        """
        with contextlib.suppress(OSError):  # closed already
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def is_open(self) -> bool:
        """Whether neither side has closed the connection, as far as this side has heard; does not wait."""
        if self.socket.fileno() < 0:
            return False
        poller = select.poll()  # not recv(MSG_DONTWAIT), which waits all the same where the socket has a timeout
        poller.register(self.socket, select.POLLRDHUP)
        return not poller.poll(0)

    def has_arrived(self) -> bool:
        """Whether bytes of the peer wait to be received; does not wait. PeerGone when the connection has ended."""
        poller = select.poll()
        try:
            poller.register(self.socket, select.POLLIN)
            if not poller.poll(0):
                return False
            first = self.socket.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError) as error:  # ValueError: closed by another thread
            raise PeerGone(f"the connection to {self.peer} broke: {error}") from error
        if not first:
            raise PeerGone(f"{self.peer} closed the connection")
        return True

    def _arm(self, deadline: Deadline, what: str) -> None:
        deadline.check(self.peer, what)
        try:
            self.socket.settimeout(max(deadline.remaining(), 1e-3))
        except OSError as error:
            raise PeerGone(f"the connection to {self.peer} is closed") from error


def connect(host: str, port: int, credentials: Credentials, deadline: Deadline) -> Channel:
    """Dial a worker and prove the token, both ways.

    Raises:
        PeerGone: not reachable, or it closed the connection (which is also how it refuses a wrong token).
        LinkError: no common wire version.
        AuthError: the peer did not prove the token.
    """
    peer = f"{host}:{port}"
    connected = sockets.dial(host, port, deadline)
    channel = Channel(connected, peer)
    try:
        handshake = ClientHandshake(credentials.token, credentials.fleet)
        channel.send(handshake.start(), deadline)
        while not handshake.done:
            try:
                payload = channel.receive(deadline, limits.PREAUTH_FRAME_BYTES_MAX)
            except PeerGone as error:
                raise LinkError(f"{error} during the handshake; are both sides of the same fleet and token?") from error
            answer = handshake.receive(payload)
            if answer is not None:
                channel.send(answer, deadline)
    except BaseException:
        channel.close()
        raise
    return channel


class ChannelServer:
    """Accepts connections in threads of its own; each that proves the token is given to ``serve``, one thread each.

    ``serve(channel)`` runs until the connection ends; it may raise any FleetError, which closes that connection and
    nothing else.
    """

    def __init__(self, listener: socket.socket, credentials: Credentials, serve: Callable[[Channel], None]) -> None:
        self._listener = listener
        self._credentials = credentials
        self._serve = serve
        self._lock = threading.Lock()
        self._open: set[Channel] = set()
        self._unproved = 0
        self._closed = False
        self.host, self.port = listener.getsockname()[:2]
        self._thread = threading.Thread(target=self._accept, name=f"fleet-accept-{self.port}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop listening and close every connection."""
        with self._lock:
            self._closed = True
            channels = list(self._open)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._listener.close()
        for channel in channels:
            channel.abort()  # its own thread may be in a system call on the file descriptor, and closes it
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout=5.0)

    @property
    def connections(self) -> int:
        """Connections open now."""
        with self._lock:
            return len(self._open)

    def _accept(self) -> None:
        while True:
            try:
                connected, address = self._listener.accept()
            except OSError as error:
                if self._closed:
                    return
                log.warn("accept.failed", port=self.port, reason=str(error))
                time.sleep(ACCEPT_PAUSE_S)  # out of file descriptors: let some be closed
                continue
            channel = Channel(connected, f"{address[0]}:{address[1]}")
            with self._lock:
                full = len(self._open) >= limits.CONNECTIONS_MAX or self._unproved >= limits.PREAUTH_CONNECTIONS_MAX
                if not full and not self._closed:
                    self._open.add(channel)
                    self._unproved += 1
            if full or self._closed:
                channel.close()
                continue
            threading.Thread(target=self._run, args=(channel,), name=f"fleet-peer-{address[1]}", daemon=True).start()

    def _run(self, channel: Channel) -> None:
        try:
            try:
                self._authenticate(channel)
            except FleetError as error:
                log.warn("auth.refused", peer=channel.peer, kind=type(error).__name__)
                return
            finally:
                with self._lock:
                    self._unproved -= 1
            try:
                self._serve(channel)
            except Corrupt as error:
                log.warn("frame.refused", peer=channel.peer, reason=str(error))
            except FleetError as error:
                log.event("link.lost", peer=channel.peer, reason=str(error))
        finally:
            channel.close()
            with self._lock:
                self._open.discard(channel)

    def _authenticate(self, channel: Channel) -> None:
        channel.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        deadline = Deadline.after(limits.PREAUTH_S, PREAUTH_SETTING)
        handshake = ServerHandshake(self._credentials.token, self._credentials.fleet)
        while not handshake.done:
            channel.send(handshake.receive(channel.receive(deadline, limits.PREAUTH_FRAME_BYTES_MAX)), deadline)
