"""``python -m vllm_fleet.controller --settings FILE``: one fleet's controller, until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import uvloop

from vllm_fleet.config.connector import bearer, read_token
from vllm_fleet.controller import engine
from vllm_fleet.controller.serving import serve_engine
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
        ConfigError: the token, the state folder, the etcd or the address cannot be used.
    """
    token = bearer(read_token(settings.token_file))
    if settings.etcd is not None:
        from vllm_fleet.controller.leader_server import Elected

        with _listening(settings) as (listener, url):
            await Elected(settings, token, listener, url, stop, env).serve(lambda: started(url))
        return
    store = EmbeddedStore(Path(settings.state_dir))
    try:
        try:
            state = engine.restore(store, settings.rules, settings.fleet, env)
        except StoreFailed as error:
            raise ConfigError(f"state_dir: {error}") from error
        with _listening(settings) as (listener, url):

            async def stopped() -> None:
                started(url)
                await stop.wait()

            await serve_engine(engine.Engine(state, store, env), listener, token, settings.host, env, stopped)
    finally:
        store.close()


@contextlib.contextmanager
def _listening(settings: ControllerSettings) -> Iterator[tuple[socket.socket, str]]:
    """The listening socket, and the URL that others have of it."""
    with contextlib.closing(sockets.listen(settings.host, settings.port, setting="controller.port")) as listener:
        host, port = listener.getsockname()[:2]
        yield listener, f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


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
