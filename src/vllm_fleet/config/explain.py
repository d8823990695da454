"""Each setting with its value and its origin, for ``vllm-fleet config explain``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from vllm_fleet.config.fleet import FleetConfig, Part
from vllm_fleet.config.load import Loaded

_SECRET_WORDS = ("TOKEN", "SECRET", "PASSWORD", "KEY", "CREDENTIAL")


@dataclass(frozen=True)
class Line:
    """One setting."""

    key: str
    value: str
    origin: str
    description: str


def explain(loaded: Loaded) -> list[Line]:
    """Every value with its origin, in the order of the tree. Environment values that look secret are hidden."""
    return _lines(loaded.config, FleetConfig, "", loaded)


def _lines(tree: Part, part: type[Part], prefix: str, loaded: Loaded) -> list[Line]:
    lines: list[Line] = []
    for name, field in part.model_fields.items():
        key, value, about = prefix + name, getattr(tree, name), field.description or ""
        if isinstance(value, Part):
            lines += _lines(value, type(value), f"{key}.", loaded)
        elif key == "env" and value:
            for variable, text in value.items():
                inner = f"env.{variable}"
                lines.append(Line(inner, _hidden(variable, text), loaded.origins.get(inner, "default"), about))
        else:
            lines.append(Line(key, _text(value), loaded.origins.get(key, "default"), about))
    return lines


def _hidden(variable: str, text: str) -> str:
    return "(hidden)" if any(word in variable.upper() for word in _SECRET_WORDS) else _text(text)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
