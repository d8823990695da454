"""Sentences about wrong values: which key, where it was set, what was expected and what was found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "literal_error": "one of {expected}",
    "greater_than": "a number greater than {gt:g}",
    "greater_than_equal": "a number not below {ge:g}",
    "less_than": "a number less than {lt:g}",
    "less_than_equal": "a number not above {le:g}",
    "string_pattern_mismatch": "text that matches {pattern}",
    "string_too_long": "at most {max_length} characters",
    "too_short": "at least {min_length} in the list",
}

_FOUND_LEN_MAX = 60


def found(value: object) -> str:
    """``value`` in words: its kind, and itself when it is short."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        text = value if len(value) <= _FOUND_LEN_MAX else value[:_FOUND_LEN_MAX] + "…"
        return f"the text {text!r}"
    if isinstance(value, int | float):
        return f"the number {str(value)[:_FOUND_LEN_MAX]}"
    if isinstance(value, list | tuple):
        return "an empty list" if not value else "a list"
    if isinstance(value, dict):
        return "a mapping"
    return f"a {type(value).__name__}"


def sentence(key: str, origin: str, problem: Mapping[str, Any]) -> str:
    """One sentence for the first problem pydantic found."""
    kind, context = str(problem["type"]), problem.get("ctx") or {}
    template = _EXPECTED.get(kind)
    expected = template.format(**context) if template is not None else str(problem["msg"])
    where = key if origin == "default" else f"{key} in {origin}"
    hint = ""
    value = problem.get("input")
    if kind == "string_type" and isinstance(value, int | float) and key.startswith(("env.", "vllm_args.")):
        hint = f"; put it in quotes: '{str(value).lower() if isinstance(value, bool) else value}'"
    return f"{where}: expected {expected}, found {found(value)}{hint}"
