"""Several controllers of one fleet, of which one leads: which to ask first. No socket, no clock."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_fleet.core.errors import BadRequest


class Candidates:
    """The URLs of a fleet's controllers, and which of them is believed to lead. Threads may share one: the worst that
    two at once can do is to ask in a poorer order.
    """

    def __init__(self, urls: str | Sequence[str]) -> None:
        self._urls = tuple(dict.fromkeys([urls] if isinstance(urls, str) else urls))
        if not self._urls:
            raise BadRequest("at least one URL of a controller is needed")
        self._first = 0

    def __len__(self) -> int:
        return len(self._urls)

    def order(self) -> list[str]:
        """All of them, the likeliest leader first."""
        first = self._first
        return [*self._urls[first:], *self._urls[:first]]

    def leads(self, url: str) -> None:
        """``url`` answered as the leader."""
        self._first = self._urls.index(url)

    def passed(self, url: str, leader: str = "") -> None:
        """``url`` did not answer, or named another ``leader``: go there, or on to the next. Whom it names is believed
        only where it is one of our own URLs: it gets the fleet's bearer token.
        """
        if leader in self._urls and leader != url:
            self._first = self._urls.index(leader)
        elif self._urls[self._first] == url:
            self._first = (self._first + 1) % len(self._urls)
