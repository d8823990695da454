"""What the HTTP layer and those it serves say to each other: requests, answers, feeds, bounds. Knows no sockets."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol
from urllib.parse import parse_qsl

from vllm_fleet.core import limits
from vllm_fleet.core.errors import BadRequest, Corrupt, PeerGone

if TYPE_CHECKING:
    from vllm_fleet.net.http.writer import Writer

JSON = "application/json"
COUNT_MAX = 2**63 - 1

Pairs = Sequence[tuple[str, str]]
"""Header lines in order."""


class PeerLeft(PeerGone):
    """The client hung up; nobody reads the answer."""


class Unreachable(PeerGone):
    """No connection to the server could be opened."""


class BrokenOff(PeerGone):
    """A connection ended before its answer did.

    ``stale``: it had been idle before, and nothing of an answer came: the server most likely closed it without having
    seen the request.
    """

    def __init__(self, message: str, *, stale: bool = False) -> None:
        super().__init__(message)
        self.stale = stale


class NotHttp(Corrupt):
    """What came is no answer of HTTP/1.1."""


@dataclass(frozen=True, slots=True)
class Rules:
    """Bounds of one server; see core/limits.py for the values."""

    head_bytes_max: int
    """A request's line and headers; more is refused with 431."""
    body_bytes_max: int
    """A larger body is refused with 413."""
    pipeline_max: int
    """Requests of one connection that wait for their answers; more are refused."""
    head_s: float
    """A head that is not complete by then is refused with 408, or the connection closed when none of it came."""
    body_s: float
    """The same for a body ..."""
    idle_s: float
    """A connection without a request is closed."""
    write_s: float
    """A peer that takes no bytes for so long is cut off."""
    linger_s: float
    """A peer may take so long to read its connection's last answer."""
    backlog: int
    """Connections that wait to be accepted."""
    connections_max: int
    """One more is closed at once."""
    files_kept: int
    """Files and sockets that connections leave to the rest of the process."""
    heads_kept: int = limits.HTTP_HEADS_KEPT
    """Heads that are remembered: one for each client that asks the same thing again and again."""
    headers_max: int = limits.HEADERS_MAX
    target_bytes_max: int = 1 << 20
    """A longer request target is refused with 414."""
    body_rate_min: float = float("inf")
    """... and a second more for each so many bytes that came."""
    public: bool = False
    """For anybody's clients: ``Host`` is required, whole URLs are taken as targets, answers are dated, and what cannot
    be done is told apart (417, 501, 505). Otherwise all of that is 400."""


@dataclass(slots=True)
class Head:
    """A request's head; shared by all requests whose heads are the same bytes, so nobody changes it."""

    method: str
    path: str
    query_text: str
    headers: dict[bytes, list[bytes]]
    keep_alive: bool
    length: int | None
    """Of the body; None: it comes in chunks."""
    in_chunks: bool
    """Whether the peer knows chunked answers."""
    expects: bool
    """Whether the peer waits to be told that its body is welcome."""
    text: dict[str, str] | None = None
    """See Request.text."""


@dataclass(slots=True)
class Request:
    """One request. ``path`` is as sent, without the query; header names are in lower case."""

    method: str
    path: str
    query_text: str
    headers: dict[bytes, list[bytes]]
    peer: str
    keep_alive: bool = True
    body: bytes = b""
    params: dict[str, str] = field(default_factory=dict)
    """The path's variable parts, decoded."""
    head: Head | None = None

    def values(self, name: bytes) -> list[bytes]:
        """Every value that the header ``name`` was sent with."""
        return self.headers.get(name, [])

    def text(self) -> dict[str, str]:
        """Headers as text, several values of one name joined as RFC 9110 (5.3) has it; not to be changed."""
        head = self.head
        if head is not None and head.text is not None:
            return head.text
        made = {name.decode("latin-1"): b", ".join(values).decode("latin-1") for name, values in self.headers.items()}
        if head is not None:
            head.text = made
        return made

    def query(self, name: str) -> str | None:
        """A query parameter; None when it is absent. Raises BadRequest when it is given twice."""
        if not self.query_text:
            return None
        try:
            pairs = parse_qsl(self.query_text, keep_blank_values=True, max_num_fields=limits.QUERY_FIELDS_MAX)
        except ValueError as error:
            raise BadRequest(f"the query has more than {limits.QUERY_FIELDS_MAX} parameters") from error
        given = [value for key, value in pairs if key == name]
        if len(given) > 1:
            raise BadRequest(f"{name}: is given {len(given)} times, must be given once")
        return given[0] if given else None

    def count(self, name: str) -> int | None:
        """A query parameter that is a whole number; None when it is absent."""
        given = self.query(name)
        if given is None:
            return None
        if not (given.isascii() and given.isdigit() and len(given) <= 19 and int(given) <= COUNT_MAX):
            raise BadRequest(f"{name}: must be a whole number from 0 to {COUNT_MAX}")
        return int(given)


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    status: int = 200
    body: bytes = b""
    content_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()


class Outlet(Protocol):
    """Where a feed writes to: one connection."""

    def write(self, part: bytes) -> bool:
        """Send ``part``. False: it is taken, but the peer is behind; nothing more until ``Feed.on_room``."""
        ...

    def end(self) -> None:
        """End the answer in order, after what was written."""
        ...

    def cut(self) -> None:
        """Break the connection at once."""
        ...


class Feed(Protocol):
    """An answer that goes on. A peer that takes nothing for ``Rules.write_s`` is cut off by the HTTP layer."""

    content_type: str

    def on_open(self, outlet: Outlet) -> None:
        """The head of the answer is sent."""
        ...

    def on_room(self) -> None:
        """The peer has caught up."""
        ...

    def on_closed(self) -> None:
        """The connection is gone, whoever ended it. Said once."""
        ...


class Speaker:
    """Answers one request by itself, part by part, as a task of its own: cancelled when the client hangs up."""

    __slots__ = ()

    async def speak(self, writer: Writer) -> None:
        """Write the answer. An answer that is left unfinished, or an exception, cuts the connection."""
        raise NotImplementedError


Handled = Answer | Speaker | Feed | Coroutine[None, None, Answer]
"""What a handler returns: an answer now, one that writes itself, a feed, or an answer later."""

Explain = Callable[[int, str, str], Answer]
"""The answer to what cannot become a request: status, a word for programs, a sentence for people."""


class Service(Protocol):
    """What the HTTP layer asks. Neither call raises, nor does what ``handle`` returns."""

    def refuse(self, request: Request) -> Answer | None:
        """Whether the request is refused before its body is read. A pure function of the request's head: what it let
        pass once may pass again unasked."""
        ...

    def handle(self, request: Request) -> Handled:
        """The answer to a complete request."""
        ...
