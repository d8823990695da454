"""``python -m vllm_fleet.controller --settings FILE``: one fleet's controller, until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import uvloop

from vllm_fleet.config.connector import bearer, read_token
from vllm_fleet.controller import engine
from vllm_fleet.controller.server import ControllerServer
from vllm_fleet.controller.settings import ControllerSettings, read_settings
from vllm_fleet.controller.stores.contract import StoreFailed
from vllm_fleet.controller.stores.embedded import EmbeddedStore
from vllm_fleet.core import log
from vllm_fleet.core.env import Env, RealEnv
from vllm_fleet.core.errors import ConfigError
from vllm_fleet.net import sockets


async def serve(settings: ControllerSettings, stop: asyncio.Event, started: Callable[[str], None], env: Env) -> None:
    """Run one controller until ``stop``; ``started`` is told its URL.

    Raises:
        ConfigError: the token, the state folder or the address cannot be used.
    """
    token = bearer(read_token(settings.token_file))
    store = EmbeddedStore(Path(settings.state_dir))
    try:
        try:
            state = engine.restore(store, settings.rules, settings.fleet, env)
        except StoreFailed as error:
            raise ConfigError(f"state_dir: {error}") from error
        listener = sockets.listen(settings.host, settings.port, setting="controller.port")
        host, port = listener.getsockname()[:2]
        running = engine.Engine(state, store, env)
        server = ControllerServer(running, token, settings.host, env)
        with contextlib.closing(listener):
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(running.run())
                try:
                    await server.start(listener)
                    started(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
                    await stop.wait()
                finally:
                    await server.close()
                    await running.stop()
    finally:
        store.close()


async def run(settings: ControllerSettings) -> None:
    """Run until a signal says stop."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await serve(settings, stop, lambda url: log.event("controller.start", url=url, fleet=settings.fleet), RealEnv())
    log.event("controller.stop", fleet=settings.fleet)


def main(argv: list[str] | None = None) -> int:
    """The process's exit status: 0 after a signal, 2 when a setting is wrong."""
    parser = argparse.ArgumentParser(prog="python -m vllm_fleet.controller", description="Membership of one fleet.")
    parser.add_argument("--settings", required=True, type=Path, metavar="FILE", help="JSON file of ControllerSettings")
    given = parser.parse_args(argv)
    log.setup()
    try:
        uvloop.run(run(read_settings(given.settings)))
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
