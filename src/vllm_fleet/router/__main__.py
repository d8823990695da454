"""``python -m vllm_fleet.router --settings FILE.json``: one router process."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys

import uvloop

from vllm_fleet.config.connector import bearer, read_token
from vllm_fleet.core import log
from vllm_fleet.core.env import RealEnv
from vllm_fleet.core.errors import ConfigError
from vllm_fleet.net.sockets import listen
from vllm_fleet.net.watch import watch
from vllm_fleet.router.app import OnEvent, running
from vllm_fleet.router.settings import RouterSettings, read_settings


async def serve(settings: RouterSettings, token: bytes) -> None:
    """Serve until SIGTERM or SIGINT; ConfigError when the address cannot be used."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    async def follow(on_event: OnEvent) -> None:
        await watch(settings.controller, bearer(token), on_event)

    with listen(settings.host, settings.port, setting="router.host, router.port", backlog=1024) as listener:
        streamed = settings.handoff == "streamed"
        timeout_s, stop_s = settings.request_timeout_s, settings.stop_s
        async with running(listener, follow, RealEnv(), timeout_s, token, streamed=streamed, stop_s=stop_s):
            await stop.wait()


def main() -> int:
    """Run until told to stop; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m vllm_fleet.router", description=__doc__)
    parser.add_argument("--settings", required=True, help="JSON file: see vllm_fleet/router/settings.py")
    arguments = parser.parse_args()
    log.setup()
    try:
        settings = read_settings(arguments.settings)
        uvloop.run(serve(settings, read_token(settings.token_file)))
    except ConfigError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
