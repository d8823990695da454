"""A small blocking client of the controller's API, for threads: each call has a deadline that bounds all of it."""

from __future__ import annotations

import http.client
import io
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote, urlsplit

import msgspec

from vllm_fleet.core import limits
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import BadRequest, Busy, Corrupt, Fenced, NotLeader, NotRegistered, PeerGone
from vllm_fleet.net import sockets
from vllm_fleet.net.candidates import Candidates
from vllm_fleet.wire import control

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

Message = TypeVar("Message")

_REGISTERED = msgspec.json.Decoder(control.Registered)
_ACK = msgspec.json.Decoder(control.HeartbeatAck)
_SNAPSHOT = msgspec.json.Decoder(control.Snapshot)
_DESIRED = msgspec.json.Decoder(control.Desired)
_DRAINING = msgspec.json.Decoder(control.Draining)


class ControlClient:
    """The controller at ``url``, or the one that leads of several. Opens a connection for each call and keeps none; any
    thread may use it. Of several, the one that answered last is asked first, then the one it names, then the others;
    each gets an equal share of the time that is left.

    Every call raises:
        PeerGone: not reachable or the connection broke; DeadlineExceeded when the deadline came first. The call may
            have taken effect or not; all calls are safe to repeat.
        Busy: the controller cannot now (503); NotLeader when none of those that answered leads.
        Fenced: a later life holds the name (409).
        NotRegistered: the controller does not know the name (404).
        BadRequest: it refused otherwise, a wrong token included.
        Corrupt: the answer is not what it must be.
    """

    def __init__(self, url: str | Sequence[str], bearer: str) -> None:
        self._candidates = Candidates(url)
        self._addresses = {each: _address(each) for each in self._candidates.order()}
        self._headers = {"Authorization": f"Bearer {bearer}", "Connection": "close"}

    def register(self, request: control.Register, deadline: Deadline) -> control.Registered:
        """Announce a life of an instance; the same answer when it is known already."""
        return _decoded(_REGISTERED, self._call("POST", "/v1/members", control.encode(request), deadline))

    def heartbeat(self, name: str, beat: control.Heartbeat, deadline: Deadline) -> control.HeartbeatAck:
        """Say that ``name`` lives."""
        path = f"/v1/members/{quote(name, safe='')}/heartbeat"
        return _decoded(_ACK, self._call("POST", path, control.encode(beat), deadline))

    def deregister(self, name: str, generation: int, deadline: Deadline) -> None:
        """Leave the fleet."""
        self._call("DELETE", f"/v1/members/{quote(name, safe='')}?generation={generation}", None, deadline)

    def snapshot(self, deadline: Deadline) -> control.Snapshot:
        """The whole fleet."""
        return _decoded(_SNAPSHOT, self._call("GET", "/v1/members", None, deadline))

    def desired(self, deadline: Deadline) -> control.Desired:
        """What the fleet is to be."""
        return _decoded(_DESIRED, self._call("GET", "/v1/desired", None, deadline))

    def desire(self, wish: control.Desired, deadline: Deadline) -> control.Desired:
        """Say what the fleet is to be, having read ``wish.revision``; Fenced when it has changed since."""
        return _decoded(_DESIRED, self._call("PUT", "/v1/desired", control.encode(wish), deadline))

    def drain(self, name: str, generation: int, deadline: Deadline) -> control.Draining:
        """Have nothing new sent to this life of ``name``; asked again, how busy it is."""
        path = f"/v1/members/{quote(name, safe='')}/drain"
        return _decoded(_DRAINING, self._call("POST", path, control.encode(control.Drain(generation)), deadline))

    def _call(self, method: str, path: str, body: bytes | None, deadline: Deadline) -> bytes:
        left = self._candidates.order()
        failed: PeerGone | NotLeader | None = None
        while left:
            url = left.pop(0)
            share = deadline.capped(deadline.remaining() / (len(left) + 1)) if left else deadline
            try:
                answer = self._ask(url, method, path, body, share)
            except NotLeader as error:
                self._candidates.passed(url, error.leader)
                if error.leader in left:
                    left.remove(error.leader)
                    left.insert(0, error.leader)
                failed = error
            except PeerGone as error:
                self._candidates.passed(url)
                failed = failed if isinstance(failed, NotLeader) else error
            else:
                self._candidates.leads(url)
                return answer
        assert failed is not None
        raise failed

    def _ask(self, url: str, method: str, path: str, body: bytes | None, deadline: Deadline) -> bytes:
        host, port = self._addresses[url]
        connection = http.client.HTTPConnection(host, port)
        connected = sockets.dial(host, port, deadline)
        connection.sock = _Bounded(connected, deadline)
        try:
            connection.request(method, path, body, self._headers)
            response = connection.getresponse()
            answer = response.read(limits.CONTROL_ANSWER_BYTES_MAX + 1)
        except TimeoutError as error:
            raise deadline.error(f"the controller at {url}", f"{method} {path}") from error
        except OSError as error:
            raise PeerGone(f"the controller at {url} closed the connection: {error.strerror or error}") from error
        except http.client.HTTPException as error:
            raise Corrupt(f"{url} did not answer in HTTP: {type(error).__name__}") from error
        finally:
            connection.close()
            connected.close()
        if len(answer) > limits.CONTROL_ANSWER_BYTES_MAX:
            raise Corrupt(f"{url} answered with more than {limits.CONTROL_ANSWER_BYTES_MAX} bytes")
        if response.status not in (200, 204):
            raise _refusal(response.status, answer)
        return answer


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname is None:
        raise BadRequest(f"the controller's URL must be http://HOST:PORT, not {url!r}")
    return parts.hostname, parts.port or 80


def _refusal(status: int, answer: bytes) -> BadRequest | Busy | PeerGone:
    try:
        body = control.decode_error(answer)
    except (ValueError, RecursionError):
        body = control.ErrorBody(f"status {status}", "unknown")
    message = f"{body.error} ({status} {body.code})"
    if status == 409:
        return Fenced(message)
    if status == 404:
        return NotRegistered(message)
    if status == 503:
        return NotLeader(message, body.leader) if body.code == "not_leader" else Busy(message)
    return BadRequest(message) if status < 500 else PeerGone(message)


def _decoded(decoder: msgspec.json.Decoder[Message], answer: bytes) -> Message:
    try:
        return decoder.decode(answer)
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"the controller's answer is not what it must be: {error}") from error


class _Bounded:
    """What http.client needs of a socket; every call on it ends by ``deadline``, however slowly bytes trickle in."""

    def __init__(self, connected: socket.socket, deadline: Deadline) -> None:
        self._connected, self._deadline = connected, deadline

    def sendall(self, payload: bytes) -> None:
        self._connected.settimeout(_remaining(self._deadline))
        self._connected.sendall(payload)

    def makefile(self, mode: str) -> io.BufferedReader:
        assert mode == "rb", mode
        return io.BufferedReader(_Reader(self._connected, self._deadline))

    def close(self) -> None:
        """http.client closes before it has read the body; who dialled closes the connection."""


class _Reader(io.RawIOBase):
    def __init__(self, connected: socket.socket, deadline: Deadline) -> None:
        super().__init__()
        self._connected, self._deadline = connected, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        self._connected.settimeout(_remaining(self._deadline))
        return self._connected.recv_into(buffer)


def _remaining(deadline: Deadline) -> float:
    if deadline.expired():
        raise TimeoutError
    return max(deadline.remaining(), 1e-3)
