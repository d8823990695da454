"""Our router in front of instances that are given on the command line instead of by a controller."""

from __future__ import annotations

import argparse
import asyncio

import msgspec
import uvloop

from vllm_fleet.core import log
from vllm_fleet.core.env import RealEnv
from vllm_fleet.net.sockets import listen
from vllm_fleet.router.app import OnEvent, running
from vllm_fleet.router.policies.settings import PolicySettings
from vllm_fleet.wire.control import Member, Snapshot


async def serve(port: int, ports: list[int], policy: PolicySettings) -> None:
    """Serve until killed."""
    members = tuple(
        Member(f"both-{number}", "both", f"http://127.0.0.1:{one}", 1, f"life-{number}", 1, "ready")
        for number, one in enumerate(ports)
    )

    async def watch(on_event: OnEvent) -> None:
        on_event(Snapshot("c", 1, members))
        await asyncio.Event().wait()

    with listen("127.0.0.1", port, setting="--port") as listener:
        async with running(listener, watch, RealEnv(), 600.0, bytes(32), policy=policy):
            await asyncio.Event().wait()


def main() -> None:
    """As told by benchmarks.prefix_trace."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ports", type=int, nargs="+", required=True)
    parser.add_argument("--policy", required=True, help="JSON")
    given = parser.parse_args()
    log.setup()
    policy = msgspec.json.decode(given.policy, type=PolicySettings)
    uvloop.run(serve(given.port, given.ports, policy))


if __name__ == "__main__":
    main()
