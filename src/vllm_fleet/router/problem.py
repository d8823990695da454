"""Errors as OpenAI clients expect them: ``{"error": {"message", "type", "param", "code"}}`` with a fitting status."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
from msgspec import Struct

from vllm_fleet.core import limits

JSON = "application/json"
_FOREIGN_TEXT_LEN_MAX = 512


class _Error(Struct):
    message: str
    type: str
    param: str | None
    code: str


class _Body(Struct):
    error: _Error


class _Looks(Struct):
    error: dict[str, msgspec.Raw]


_encode = msgspec.json.Encoder().encode
_looks_like_openai = msgspec.json.Decoder(_Looks).decode


@dataclass(frozen=True, slots=True)
class Problem:
    """One error answer."""

    status: int
    code: str
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        """The answer's bytes."""
        return _encode(_Body(_Error(self.message, self.type, self.param, self.code)))

    def event(self) -> bytes:
        """The same as the last event of a stream that broke; no ``[DONE]`` follows it."""
        return b"data: " + self.body() + b"\n\n"


def invalid_json(why: str) -> Problem:
    """The body is no JSON object."""
    return Problem(400, "invalid_json", f"The request body is not a valid JSON object: {why}.")


def media_type() -> Problem:
    """The body is not plain JSON."""
    message = "The request body must be JSON: send it uncompressed, with Content-Type: application/json."
    return Problem(415, "unsupported_media_type", message)


def too_large(bytes_max: int) -> Problem:
    """The body is over the limit."""
    return Problem(413, "request_too_large", f"The request body is over {bytes_max} bytes.")


def headers_too_large(bytes_max: int) -> Problem:
    """The headers are over the limit."""
    return Problem(431, "headers_too_large", f"The request's headers are over {bytes_max} bytes.")


def unknown_path(path: str) -> Problem:
    """Nothing is served there."""
    return Problem(404, "unknown_path", f"There is nothing at {path[:200]}.")


def unknown_request(id_: str) -> Problem:
    """No timeline of this id."""
    message = f"No request {id_[:200]} among the last {limits.TIMELINES_MAX}."
    return Problem(404, "unknown_request", message)


def not_authorized() -> Problem:
    """For operators only."""
    message = "This needs the header Authorization: Bearer with the fleet's API secret (derived from its token)."
    return Problem(401, "not_authorized", message, headers={"WWW-Authenticate": "Bearer"})


def wrong_method(method: str, path: str, allowed: str) -> Problem:
    """Something is served there, but not so."""
    message = f"{path[:200]} takes {allowed}, not {method[:16]}."
    return Problem(405, "wrong_method", message, headers={"Allow": allowed})


def no_instance() -> Problem:
    """No instance can answer now."""
    message = "No instance of this fleet is ready; try again shortly."
    return Problem(503, "no_ready_instance", message, "service_unavailable", headers=_retry())


def overloaded() -> Problem:
    """The router is full."""
    message = f"The router works on {limits.REQUESTS_MAX} requests already; try again shortly."
    return Problem(503, "overloaded", message, "service_unavailable", headers=_retry())


def too_many(retry_after_s: int) -> Problem:
    """More requests than the fleet takes and the queue holds."""
    message = f"The fleet has more requests than it can take now; try again in {retry_after_s} s."
    return Problem(429, "too_many_requests", message, "rate_limit_error", headers={"Retry-After": str(retry_after_s)})


def stopping() -> Problem:
    """The router goes down."""
    message = "The router is stopping; send the request again."
    return Problem(503, "router_stopping", message, "service_unavailable", headers=_retry())


def upstream_died(instance: str) -> Problem:
    """Every instance tried failed before its first byte."""
    message = f"Instance {instance} stopped answering, and no other could take the request over."
    return Problem(502, "upstream_died", message, "server_error")


def stream_broke(instance: str) -> Problem:
    """The instance failed after its first byte."""
    message = f"Instance {instance} stopped in the middle of the answer; what came before is incomplete."
    return Problem(502, "upstream_died", message, "server_error")


def deadline(seconds: float) -> Problem:
    """The request took too long."""
    message = f"The request took longer than {seconds:g} s (setting: router.request_timeout_s)."
    return Problem(504, "deadline_exceeded", message, "server_error")


def internal() -> Problem:
    """A fault of ours."""
    return Problem(500, "internal_error", "The router failed on this request; its log says more.", "server_error")


def foreign(instance: str, status: int, body: bytes) -> bytes:
    """An instance's own error body: unchanged when it is an OpenAI error object, else wrapped in one."""
    try:
        _looks_like_openai(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        text = body[:_FOREIGN_TEXT_LEN_MAX].decode(errors="replace").strip() or "(empty)"
        kind = "invalid_request_error" if status < 500 else "server_error"
        message = f"Instance {instance} answered {status}: {text}"
        return Problem(status, "instance_error", message, kind).body()
    return body


def _retry() -> dict[str, str]:
    return {"Retry-After": str(limits.RETRY_AFTER_S)}
