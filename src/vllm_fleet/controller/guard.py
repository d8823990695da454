"""Who may talk to the controller: typed refusals, no browsers, no strangers. A wrapper around every request."""

from __future__ import annotations

import hmac
import ipaddress
import logging
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler

from vllm_fleet.core import log
from vllm_fleet.core.env import Env
from vllm_fleet.core.errors import BadRequest, Busy
from vllm_fleet.wire.control import ErrorBody, encode

WARN_EVERY_S = 1.0
CODES = {400: "bad_request", 404: "not_found", 405: "method_not_allowed", 413: "too_large"}


def refusal(status: int, code: str, error: str) -> web.Response:
    """An ErrorBody answer; 503 says when to come again."""
    headers = {"Retry-After": "1"} if status == 503 else None
    return web.Response(
        status=status, body=encode(ErrorBody(error, code)), content_type="application/json", headers=headers
    )


class Guard:
    """The checks that every request passes before its handler: Host, Origin, bearer token."""

    def __init__(self, bearer: str, own_host: str, env: Env) -> None:
        self._expected = f"Bearer {bearer}".encode()
        self._own_host = own_host.lower()
        self._env = env
        self._warn_at = 0.0

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer every failure with an ErrorBody."""
        try:
            refused = self._refused(request)
            return await handler(request) if refused is None else refused
        except web.HTTPException as error:
            answer = refusal(error.status, CODES.get(error.status, "refused"), f"{request.method}: {error.reason}")
            if "Allow" in error.headers:
                answer.headers["Allow"] = error.headers["Allow"]
            return answer
        except Busy as error:
            return refusal(503, "busy", str(error))
        except BadRequest as error:
            return refusal(400, "bad_request", str(error))
        except Exception as error:  # noqa: BLE001 - outermost loop: one bad request must not end the controller
            log.event("controller.bug", level=logging.ERROR, kind=type(error).__name__, reason=str(error))
            return refusal(500, "bug", "the controller failed on this request; its log says why")

    def _refused(self, request: web.Request) -> web.Response | None:
        hosts = request.headers.getall("Host", [])
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            return self._warned(request, refusal(403, "host", "Host must be an IP address or localhost"))
        if "Origin" in request.headers:
            return self._warned(request, refusal(403, "origin", "requests of web pages are refused"))
        if request.path == "/health":
            return None
        given = request.headers.getall("Authorization", [])
        if len(given) != 1 or not hmac.compare_digest(given[0].encode("utf-8", "surrogateescape"), self._expected):
            return self._warned(request, refusal(401, "unauthorized", "the fleet's bearer token is needed"))
        return None

    def _is_ours(self, host: str) -> bool:
        """A name that a stranger's DNS can point at us is not ours (DNS rebinding)."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in ("localhost", self._own_host):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _warned(self, request: web.Request, answer: web.Response) -> web.Response:
        now = self._env.now()
        if now >= self._warn_at:
            self._warn_at = now + WARN_EVERY_S
            log.warn("auth.refused", peer=request.remote, status=answer.status)
        return answer
