"""The router's bounds for its HTTP server."""

from __future__ import annotations

from vllm_fleet.core import limits
from vllm_fleet.net.http.messages import Rules


def router_rules() -> Rules:
    """The router's bounds."""
    return Rules(
        head_bytes_max=limits.HEADER_BYTES_MAX,
        body_bytes_max=limits.REQUEST_BODY_BYTES_MAX,
        pipeline_max=limits.ROUTER_PIPELINE_MAX,
        head_s=limits.ROUTER_HEAD_S,
        body_s=limits.ROUTER_BODY_S,
        idle_s=limits.ROUTER_IDLE_S,
        write_s=limits.ROUTER_WRITE_S,
        linger_s=limits.ROUTER_LINGER_S,
        backlog=limits.ROUTER_BACKLOG,
        connections_max=limits.ROUTER_CONNECTIONS_MAX,
        files_kept=limits.ROUTER_FILES_KEPT,
        target_bytes_max=limits.ROUTER_TARGET_BYTES_MAX,
        body_rate_min=limits.ROUTER_BODY_RATE_MIN,
        public=True,
    )
