"""The OpenAPI document of the API, made from the table of routes and the messages' types."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from vllm_fleet.controller.routes import Query, Route, Routes, Schema
from vllm_fleet.wire.control import ErrorBody
from vllm_fleet.wire.names import Name

API_VERSION = "1"
_REF = "#/components/schemas/{name}"

Json = dict[str, Any]
"""A part of the document, which has no shape of its own in our types."""


def document(routes: Routes) -> Json:
    """The document, ready to be encoded."""
    named = sorted(routes.all, key=lambda route: (route.path, route.method))
    types = [schema for route in named for schema in _types(route)]
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF)
    found = iter(schemas)
    paths: Json = {}
    for route in named:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, [next(found) for _ in _types(route)])
    made: Json = {
        "openapi": "3.1.0",
        "info": {
            "title": "vllm-fleet controller",
            "version": API_VERSION,
            "description": "Membership of one fleet. Calls are safe to repeat. Unknown fields are ignored.",
        },
        "security": [{"fleet_token": []}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"fleet_token": {"type": "http", "scheme": "bearer"}},
        },
    }
    portable: Json = _portable(made)
    return portable


def _types(route: Route) -> list[Schema]:
    """Every type that a call names, in the order in which _operation uses them up."""
    answers = [schema for schema in route.answers.values() if schema is not None and not isinstance(schema, str)]
    takes = [] if route.takes is None else [route.takes]
    return [*(Name for _ in route.params), *(query.schema for query in route.query), *takes, *answers, ErrorBody]


def _operation(route: Route, schemas: list[Json]) -> Json:
    left = iter(schemas)
    parameters = [{"name": name, "in": "path", "required": True, "schema": next(left)} for name in route.params] + [
        _query(query, next(left)) for query in route.query
    ]
    made: Json = {"operationId": _id(route), "description": route.about, "parameters": parameters}
    if route.takes is not None:
        made["requestBody"] = {"required": True, "content": {"application/json": {"schema": next(left)}}}
    made["responses"] = {str(status): _answer(route, held, left) for status, held in route.answers.items()}
    made["responses"]["default"] = {
        "description": "refused: `code` says why, for programs",
        "content": {"application/json": {"schema": next(left)}},
    }
    if not route.needs_token:
        made["security"] = []
    return made


def _answer(route: Route, held: Schema | str | None, left: Any) -> Json:
    if held is None:
        return {"description": "done"}
    if isinstance(held, str):
        return {"description": "text", "content": {held: {"schema": {"type": "string"}}}}
    media = "application/x-ndjson" if route.lines else "application/json"
    what = "lines of JSON, each one of these" if route.lines else "done"
    return {"description": what, "content": {media: {"schema": next(left)}}}


def _query(query: Query, schema: Json) -> Json:
    return {
        "name": query.name,
        "in": "query",
        "required": query.required,
        "description": query.about,
        "schema": schema,
    }


def _id(route: Route) -> str:
    words = re.sub(r"[^A-Za-z0-9]+", "_", route.path.removeprefix("/v1")).strip("_")
    return f"{route.method.lower()}_{words}"


def _portable(part: Any) -> Any:
    r"""Regular expressions as JSON Schema has them: ``\Z`` is Python's own."""
    if isinstance(part, dict):
        return {
            key: re.sub(r"\\Z$", "$", value) if key == "pattern" and isinstance(value, str) else _portable(value)
            for key, value in part.items()
        }
    return [_portable(value) for value in part] if isinstance(part, list) else part
