"""What every part of the configuration tree is made of."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Part(BaseModel):
    """Base of every part of the tree."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


def _word(value: Any) -> Any:
    return "off" if value is False else value


OFF = BeforeValidator(_word)
"""YAML reads the word off as false; where off is one of the words, that is what was meant."""
