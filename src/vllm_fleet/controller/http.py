"""The controller's bounds for its HTTP server, which is net/http's."""

from __future__ import annotations

from vllm_fleet.controller.exchange import refusal
from vllm_fleet.core import limits
from vllm_fleet.net.http.messages import Rules, Service
from vllm_fleet.net.http.server import HttpServer

RULES = Rules(
    head_bytes_max=limits.CONTROL_HEAD_BYTES_MAX,
    body_bytes_max=limits.CONTROL_BODY_BYTES_MAX,
    pipeline_max=limits.CONTROL_PIPELINE_MAX,
    head_s=limits.CONTROL_HEAD_S,
    body_s=limits.CONTROL_BODY_S,
    heads_kept=limits.CONTROL_HEADS_KEPT,
    idle_s=limits.CONTROL_IDLE_S,
    write_s=limits.WATCH_WRITE_S,
    linger_s=limits.CONTROL_LINGER_S,
    backlog=limits.CONTROL_BACKLOG,
    connections_max=limits.CONTROL_CONNECTIONS_MAX,
    files_kept=limits.CONTROL_FILES_KEPT,
)


def http_server(service: Service) -> HttpServer:
    """A server for the controller's API."""
    return HttpServer(service, RULES, refusal)
