"""Serves one restored state until somebody says stop: the part that a controller alone and an elected one share."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

from vllm_fleet.controller.engine import Engine
from vllm_fleet.controller.server import ControllerServer
from vllm_fleet.core.env import Env


async def serve_engine(
    running: Engine, listener: socket.socket, bearer: str, own_host: str, env: Env, until: Callable[[], Awaitable[None]]
) -> None:
    """Answer on ``listener``, closed at the end, until ``until`` returns. Turns that wait then are finished."""
    server = ControllerServer(running, bearer, own_host, env)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(running.run())
        try:
            await server.start(listener)
            await until()
        finally:
            await server.close()
            await running.stop()
