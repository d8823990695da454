"""One small HTTP GET with a deadline and a size limit, for the launcher's own questions."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from vllm_fleet.core import limits
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import Corrupt, PeerGone
from vllm_fleet.net import sockets


def get(url: str, deadline: Deadline, headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
    """Status and body. HTTP/1.0, so that the answer ends with the connection.

    Raises:
        PeerGone: not reachable, or not finished before ``deadline``.
        Corrupt: the answer is no HTTP, or longer than ANSWER_BYTES_MAX.
    """
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or 80
    lines = [f"GET {parts.path or '/'} HTTP/1.0", f"Host: {parts.netloc}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    with sockets.dial(host, port, deadline) as connected:
        try:
            connected.settimeout(deadline.remaining() or 1e-3)
            connected.sendall("\r\n".join([*lines, "", ""]).encode("ascii"))
            answer = bytearray()
            while True:
                connected.settimeout(deadline.remaining() or 1e-3)
                read = connected.recv(65_536)
                if not read:
                    break
                answer += read
                if len(answer) > limits.ANSWER_BYTES_MAX:
                    raise Corrupt(f"the answer of {url} is longer than {limits.ANSWER_BYTES_MAX} bytes")
        except TimeoutError as error:
            raise deadline.error(url, "its answer") from error
        except OSError as error:
            raise PeerGone(f"{url} closed the connection: {error.strerror or error}") from error
    head, separator, body = bytes(answer).partition(b"\r\n\r\n")
    status = head.split(b"\r\n", 1)[0].split(b" ")
    if not separator or len(status) < 2 or not status[0].startswith(b"HTTP/1.") or not status[1].isdigit():
        raise Corrupt(f"{url} did not answer in HTTP")
    return int(status[1]), body


def healthy(url: str, deadline: Deadline, *, any_status: bool = False) -> bool:
    """Whether ``url`` answers 200, or with ``any_status`` whether it answers at all."""
    try:
        status, _ = get(url, deadline)
    except (PeerGone, Corrupt):
        return False
    return any_status or status == 200
