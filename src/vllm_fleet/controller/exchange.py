"""Answers as the controller gives them: JSON, and errors of one shape."""

from __future__ import annotations

from msgspec import Struct

from vllm_fleet.net.http.messages import Answer
from vllm_fleet.wire import control

_AGAIN = (("Retry-After", "1"),)


def answer_json(body: Struct | None, status: int = 200) -> Answer:
    """``body`` as JSON, nothing for None; 503 says when to come again."""
    return Answer(status, b"" if body is None else control.encode(body), headers=_AGAIN if status == 503 else ())


def refusal(status: int, code: str, error: str, *, leader: str = "", allow: str = "") -> Answer:
    """An ErrorBody answer. ``allow``: the methods that a path has."""
    headers = _AGAIN if status == 503 else (("Allow", allow),) if allow else ()
    return Answer(status, control.encode(control.ErrorBody(error, code, leader)), headers=headers)
