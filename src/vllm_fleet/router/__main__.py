"""``python -m vllm_fleet.router --settings FILE.json``: one router process."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
from pathlib import Path

import uvloop

from vllm_fleet.config.connector import bearer, read_token
from vllm_fleet.core import limits, log
from vllm_fleet.core.env import RealEnv
from vllm_fleet.core.errors import ConfigError
from vllm_fleet.net.sockets import listen
from vllm_fleet.net.watch import watch
from vllm_fleet.router.app import OnEvent, running
from vllm_fleet.router.front import make_front
from vllm_fleet.router.parent import serve_with_workers
from vllm_fleet.router.settings import RouterSettings, read_settings, with_workers
from vllm_fleet.router.worker import Worker, stop_with_parent


def _stop_when_told() -> asyncio.Event:
    """Set by SIGTERM and SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


async def serve(settings: RouterSettings, token: bytes, worker: Worker | None = None) -> int:
    """Serve until SIGTERM or SIGINT; the exit status. ConfigError when the address cannot be used."""
    stop, shared = _stop_when_told(), worker is not None
    if shared:
        stop_with_parent(stop)

    async def follow(on_event: OnEvent) -> None:
        await watch(settings.controller, bearer(token), on_event)

    env, part = RealEnv(), settings.front
    front = make_front(part, settings.fleet, token, env)
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, front.observer.reopen)
    address, setting = (settings.host, settings.port), "router.host, router.port"
    with contextlib.ExitStack() as stack:
        stack.callback(front.close)
        listener = stack.enter_context(listen(*address, setting=setting, backlog=limits.ROUTER_BACKLOG, shared=shared))
        admin = None
        if part.admin_port is not None:
            address, setting = (part.admin_host, part.admin_port), "router.admin_host, router.admin_port"
            admin = stack.enter_context(listen(*address, setting=setting, shared=shared))
        streamed, policy = settings.handoff == "streamed", settings.policy
        timeout_s, stop_s = settings.request_timeout_s, settings.stop_s
        async with running(
            *(listener, follow, env, timeout_s, token),
            streamed=streamed,
            policy=policy,
            rules=settings.requests,
            stop_s=stop_s,
            front=front,
            admin=admin,
            worker=worker,
        ):
            await stop.wait()
    return 0


async def serve_all(settings: RouterSettings, settings_file: str) -> int:
    """Serve with several processes until SIGTERM or SIGINT; the exit status."""
    return await serve_with_workers(settings, settings_file, _stop_when_told())


def main() -> int:
    """Run until told to stop; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m vllm_fleet.router", description=__doc__)
    parser.add_argument("--settings", required=True, help="JSON file: see vllm_fleet/router/settings.py")
    parser.add_argument("--workers", type=int, help="processes that share the port; default: as the settings say")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    log.setup()
    try:
        settings = read_settings(arguments.settings)
        if arguments.worker is not None:
            worker = Worker(arguments.worker, settings.workers, Path(arguments.settings).parent)
            return uvloop.run(serve(settings, read_token(settings.token_file), worker))
        if arguments.workers is not None:
            settings = with_workers(settings, arguments.workers)
        if settings.workers > 1:
            return uvloop.run(serve_all(settings, arguments.settings))
        return uvloop.run(serve(settings, read_token(settings.token_file)))
    except ConfigError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 2


if __name__ == "__main__":
    sys.exit(main())
