"""What the HTTP layer and the API say to each other: requests, answers, feeds. Knows no sockets and no members."""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import parse_qsl

from msgspec import Struct

from vllm_fleet.core import limits
from vllm_fleet.core.errors import BadRequest
from vllm_fleet.wire import control

JSON = "application/json"
COUNT_MAX = 2**63 - 1
_AGAIN = (("Retry-After", "1"),)


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

    def values(self, name: bytes) -> list[bytes]:
        """Every value that the header ``name`` was sent with."""
        return self.headers.get(name, [])

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
    """An answer that goes on. A peer that takes nothing for WATCH_WRITE_S is cut off by the HTTP layer."""

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


Handled = Answer | Feed | Coroutine[None, None, Answer]
"""What a handler returns: an answer now, a feed, or an answer later."""


class Service(Protocol):
    """What the HTTP layer asks. Neither call raises, nor does what ``handle`` returns."""

    def refuse(self, request: Request) -> Answer | None:
        """Whether the request is refused before its body is read."""
        ...

    def handle(self, request: Request) -> Handled:
        """The answer to a complete request."""
        ...


def answer_json(body: Struct | None, status: int = 200) -> Answer:
    """``body`` as JSON, nothing for None; 503 says when to come again."""
    return Answer(status, b"" if body is None else control.encode(body), headers=_AGAIN if status == 503 else ())


def refusal(status: int, code: str, error: str, *, leader: str = "", allow: str = "") -> Answer:
    """An ErrorBody answer. ``allow``: the methods that a path has."""
    headers = _AGAIN if status == 503 else (("Allow", allow),) if allow else ()
    return Answer(status, control.encode(control.ErrorBody(error, code, leader)), headers=headers)
