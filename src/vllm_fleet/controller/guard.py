"""Who may talk to the controller: no browsers, no strangers. Asked for every request, before its body is read."""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from vllm_fleet.controller.exchange import refusal
from vllm_fleet.core import log
from vllm_fleet.core.env import Env
from vllm_fleet.net.hosts import is_ours
from vllm_fleet.net.http.messages import Answer, Request

WARN_EVERY_S = 1.0


class Guard:
    """The checks that every request passes: Host, Origin, bearer token. ``open_paths`` need no token."""

    def __init__(self, bearer: str, own_host: str, open_paths: Iterable[str], env: Env) -> None:
        self._expected = f"Bearer {bearer}".encode()
        self._own_host = own_host.lower()
        self._open_paths = frozenset(open_paths)
        self._env = env
        self._warn_at = 0.0

    def refuse(self, request: Request) -> Answer | None:
        """The refusal; None when the request may go on."""
        hosts = request.values(b"host")
        if len(hosts) != 1 or not is_ours(hosts[0], self._own_host):
            return self._warned(request, refusal(403, "host", "Host must be an IP address or localhost"))
        if request.values(b"origin"):
            return self._warned(request, refusal(403, "origin", "requests of web pages are refused"))
        if request.path in self._open_paths:
            return None
        given = request.values(b"authorization")
        if len(given) != 1 or not hmac.compare_digest(given[0], self._expected):
            return self._warned(request, refusal(401, "unauthorized", "the fleet's bearer token is needed"))
        return None

    def _warned(self, request: Request, answer: Answer) -> Answer:
        now = self._env.now()
        if now >= self._warn_at:
            self._warn_at = now + WARN_EVERY_S
            log.warn("auth.refused", peer=request.peer, status=answer.status)
        return answer
