"""The one table of the API's routes. Dispatch, guard and OpenAPI document all come from it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import unquote

import msgspec
from msgspec import Struct

from vllm_fleet.core.errors import BadRequest
from vllm_fleet.net.http.messages import Handled, Request
from vllm_fleet.wire.names import DECODE_ERRORS

Handler = Callable[[Request], Handled]
Message = TypeVar("Message", bound=Struct)
Schema = Any
"""A type as msgspec takes it: a Struct, a union of Structs, an Annotated one."""


@dataclass(frozen=True)
class Query:
    """A query parameter, for the document; handlers read it from the Request."""

    name: str
    schema: Schema
    about: str
    required: bool = False


class Taking(Generic[Message]):
    """A handler that gets the request's body as a ``message``; any other body is refused with 400."""

    def __init__(self, message: type[Message], handler: Callable[[Request, Message], Handled]) -> None:
        self.message, self.about = message, handler.__doc__
        self._decode = msgspec.json.Decoder(message).decode
        self._handler = handler

    def __call__(self, request: Request) -> Handled:
        try:
            message = self._decode(request.body)
        except DECODE_ERRORS as error:
            raise BadRequest(f"the body is not what it must be: {error}") from error
        return self._handler(request, message)


@dataclass(frozen=True)
class Route:
    """One call; the handler's docstring is its description.

    ``answers``: what its good answers hold, by status: a type (as JSON), the name of another media type, or nothing.
    ``lines``: such an answer is JSON of that type line by line, for as long as the connection lives.
    """

    method: str
    path: str
    handler: Handler | Taking[Any]
    answers: Mapping[int, Schema | str | None]
    query: tuple[Query, ...] = ()
    lines: bool = False
    needs_token: bool = True

    @property
    def takes(self) -> type[Struct] | None:
        """The type of the request's body."""
        return self.handler.message if isinstance(self.handler, Taking) else None

    @property
    def about(self) -> str:
        """What the call does."""
        text = self.handler.about if isinstance(self.handler, Taking) else self.handler.__doc__
        assert text, f"{self.method} {self.path}: its handler has no docstring, which is the API's documentation"
        return inspect.cleandoc(text)

    @property
    def params(self) -> list[str]:
        """The names of the path's variable parts."""
        return [part.strip("{}") for part in self.path.split("/") if part.startswith("{")]


@dataclass
class _Node:
    """One place in the tree of paths."""

    routes: dict[str, Route] = field(default_factory=dict)
    children: dict[str, _Node] = field(default_factory=dict)
    variable: tuple[str, _Node] | None = None


@dataclass(frozen=True)
class NoRoute:
    """Nothing is called like this; ``allowed``: methods that this path has."""

    allowed: tuple[str, ...] = ()


class Routes:
    """Finds the route of a request."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self.all = tuple(routes)
        self._root = _Node()
        for route in self.all:
            self._add(route)

    def find(self, method: str, path: str) -> tuple[Route, dict[str, str]] | NoRoute:
        """The route, and the path's variable parts."""
        node = self._root
        params: dict[str, str] = {}
        for part in path.split("/")[1:]:
            child = node.children.get(part)
            if child is None:
                if node.variable is None or not part:
                    return NoRoute()
                name, child = node.variable
                params[name] = unquote(part) if "%" in part else part
            node = child
        route = node.routes.get(method)
        return NoRoute(tuple(sorted(node.routes))) if route is None else (route, params)

    def _add(self, route: Route) -> None:
        node = self._root
        for part in route.path.split("/")[1:]:
            if part.startswith("{"):
                if node.variable is None:
                    node.variable = (part.strip("{}"), _Node())
                assert node.variable[0] == part.strip("{}"), f"{route.path}: two names for one part"
                node = node.variable[1]
            else:
                node = node.children.setdefault(part, _Node())
        assert route.method not in node.routes, f"two routes {route.method} {route.path}"
        node.routes[route.method] = route
