"""The OpenAPI document: it has every call, and what is really answered is what it says."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import jsonschema
import pytest

from vllm_fleet.controller import journal
from vllm_fleet.controller.engine import Engine
from vllm_fleet.controller.routes import Route, Routes
from vllm_fleet.controller.server import ControllerServer, Front
from vllm_fleet.controller.state import FleetState, Rules
from vllm_fleet.controller.stores.memory import MemoryStore
from vllm_fleet.controller.watchers import Watcher
from vllm_fleet.core.env import RealEnv
from vllm_fleet.net.http.messages import Answer, Request
from vllm_fleet.wire import control

Document = dict[str, Any]


@pytest.fixture
async def front() -> AsyncIterator[Front]:
    """The API without its sockets."""
    store, state = MemoryStore(), FleetState("journal", Rules())
    store.rewrite(journal.to_records(state))
    engine = Engine(state, store, RealEnv())
    running = asyncio.create_task(engine.run())
    server = ControllerServer(engine, "token", "127.0.0.1", RealEnv())
    yield server.front
    await server.close()
    await engine.stop()
    await running


async def answered(front: Front, method: str, target: str, body: bytes = b"") -> Answer:
    path, _, query = target.partition("?")
    handled = front.handle(Request(method, path, query, {}, "peer", body=body))
    if isinstance(handled, Answer):
        return handled
    assert inspect.iscoroutine(handled)
    answer = await handled
    assert isinstance(answer, Answer)
    return answer


async def document_of(front: Front) -> Document:
    document: Document = json.loads((await answered(front, "GET", "/openapi.json")).body)
    return document


def schema_of(document: Document, method: str, path: str, status: int) -> Any:
    answers = document["paths"][path][method.lower()]["responses"]
    answer = answers.get(str(status), answers["default"])
    [held] = answer.get("content", {"nothing": {"schema": None}}).values()
    return held["schema"]


def check(document: Document, schema: Any, value: Any) -> None:
    whole = {**schema, "components": document["components"]}
    jsonschema.Draft202012Validator(whole).validate(value)


def listed(document: Document) -> set[tuple[str, str]]:
    return {(method.upper(), path) for path, calls in document["paths"].items() for method in calls}


async def test_every_route_is_in_the_document_and_every_call_of_it_is_routed(front: Front) -> None:
    document = await document_of(front)
    assert listed(document) == {(route.method, route.path) for route in front.routes.all}
    for method, path in listed(document):
        assert isinstance(front.routes.find(method, path.replace("{", "").replace("}", "")), tuple)
    ids = [call["operationId"] for calls in document["paths"].values() for call in calls.values()]
    assert len(set(ids)) == len(ids)


async def test_the_calls_that_the_messages_name_are_in_the_document(front: Front) -> None:
    document = await document_of(front)
    named = re.findall(r"^\| ([A-Z]+) (/\S*?)(?:\?\S*)? \|", control.__doc__ or "", re.MULTILINE)
    assert len(named) >= 7
    assert {(method, path.replace("NAME", "{name}")) for method, path in named} <= listed(document)


async def test_only_health_is_open(front: Front) -> None:
    document = await document_of(front)
    free = {path for path, calls in document["paths"].items() for call in calls.values() if call.get("security") == []}
    assert free == {"/health"}
    assert document["security"] == [{"fleet_token": []}]


async def test_every_schema_is_valid_and_found(front: Front) -> None:
    document = await document_of(front)
    text = json.dumps(document)
    names = set(re.findall(r'"#/components/schemas/([^"]+)"', text))
    assert names == set(document["components"]["schemas"])
    assert "\\Z" not in text, "not a regular expression outside Python"
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    member = document["components"]["schemas"]["Member"]
    assert member["properties"]["name"]["pattern"] == "^[A-Za-z0-9][A-Za-z0-9._-]*$"


HELLO = control.encode(control.Register("a", "both", "http://127.0.0.1:1", 7, "life", "ready", {"model": "m"}))


@pytest.mark.parametrize(
    ("method", "target", "path", "body", "status"),
    [
        ("POST", "/v1/members", "/v1/members", HELLO, 200),
        ("POST", "/v1/members", "/v1/members", HELLO.replace(b'"life"', b'"life-2"'), 200),
        ("POST", "/v1/members", "/v1/members", HELLO.replace(b'"a"', b'"b"'), 409),
        ("POST", "/v1/members", "/v1/members", b"{}", 400),
        ("POST", "/v1/members/a/heartbeat", "/v1/members/{name}/heartbeat", b'{"generation":1,"state":"ready"}', 200),
        ("POST", "/v1/members/%61/heartbeat", "/v1/members/{name}/heartbeat", b'{"generation":1,"state":"ready"}', 200),
        (
            "POST",
            "/v1/members/a/heartbeat",
            "/v1/members/{name}/heartbeat",
            b'{"generation":1,"state":"draining"}',
            200,
        ),
        ("POST", "/v1/members/b/heartbeat", "/v1/members/{name}/heartbeat", b'{"generation":1,"state":"ready"}', 404),
        ("GET", "/v1/members", "/v1/members", b"", 200),
        ("DELETE", "/v1/members/a", "/v1/members/{name}", b"", 400),
        ("DELETE", "/v1/members/a?generation=9", "/v1/members/{name}", b"", 409),
        ("DELETE", "/v1/members/a?generation=1&generation=2", "/v1/members/{name}", b"", 400),
        ("DELETE", "/v1/members/a?generation=1", "/v1/members/{name}", b"", 204),
        ("GET", "/health", "/health", b"", 200),
        ("GET", "/metrics", "/metrics", b"", 200),
    ],
)
async def test_what_is_answered_is_what_the_document_says(
    front: Front, method: str, target: str, path: str, body: bytes, status: int
) -> None:
    document = await document_of(front)
    await answered(front, "POST", "/v1/members", HELLO)
    answer = await answered(front, method, target, body)
    assert answer.status == status, answer.body
    schema = schema_of(document, method, path, status)
    if schema is None:
        assert answer.body == b""
    elif answer.content_type == "application/json":
        check(document, schema, json.loads(answer.body))
    else:
        assert (path, schema) == ("/metrics", {"type": "string"})


async def test_what_watchers_are_told_is_what_the_document_says(front: Front) -> None:
    document = await document_of(front)
    schema = schema_of(document, "GET", "/v1/watch", 200)
    lines: list[bytes] = []

    class Outlet:
        def write(self, part: bytes) -> bool:
            lines.extend(part.splitlines())
            return True

        def end(self) -> None: ...

        def cut(self) -> None: ...

    for query in ("", "?since=1&controller=journal"):
        await answered(front, "POST", "/v1/members", HELLO)
        watcher = front.handle(Request("GET", "/v1/watch", query[1:], {}, "peer"))
        assert isinstance(watcher, Watcher)
        watcher.on_open(Outlet())
        await answered(front, "POST", "/v1/members", HELLO.replace(b'"life"', b'"life-2"'))
        watcher.on_closed()
    for line in lines:
        check(document, schema, json.loads(line))
    assert {json.loads(line)["type"] for line in lines} >= {"snapshot", "change"}
    with pytest.raises(jsonschema.ValidationError):
        check(document, schema, {"type": "change"})


def test_a_route_is_listed_once_and_documented() -> None:
    def undocumented(request: Request) -> Answer:
        return Answer()

    route = Route("GET", "/a", undocumented, {200: None})
    with pytest.raises(AssertionError, match="two routes GET /a"):
        Routes([route, route])
    with pytest.raises(AssertionError, match="no docstring"):
        assert route.about
