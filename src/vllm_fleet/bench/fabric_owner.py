"""The owner's process of `vllm-fleet bench fabric`: one pool, registered with every transport, and a plain TCP stream.

Reads its settings as one line of JSON from standard input (the token is no business of the process list), answers one
line of JSON, and lives until standard input ends. The line ``cpu`` is answered with the CPU seconds used so far.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import socket
import sys
import threading
import time
from typing import Any

import msgspec
from msgspec import Struct

from vllm_fleet.bench.blocks import Blocks, make_blocks
from vllm_fleet.core.errors import FleetError
from vllm_fleet.fabric import integrity, transports
from vllm_fleet.fabric.endpoint import Endpoint
from vllm_fleet.net import sockets
from vllm_fleet.net.channel import Credentials
from vllm_fleet.wire.fabric import PoolHandle

FLEET = "bench"
STREAM_BYTES = 1 << 20


class OwnerSettings(Struct, frozen=True):
    """What the owner is to hold and offer."""

    token: str
    nbytes: int
    transports: tuple[str, ...]
    cuda: int | None = None


class OwnerReady(Struct, frozen=True):
    """What the reader needs; ``refused`` gives the reason of each transport that cannot be had."""

    host: str
    port: int
    stream_port: int
    handles: dict[str, PoolHandle]
    refused: dict[str, str]


def register(names: tuple[str, ...], endpoint: Endpoint, blocks: Blocks) -> tuple[dict[str, Any], OwnerReady]:
    """Register a pool with each transport that can be had."""
    made: dict[str, Any] = {}
    handles: dict[str, PoolHandle] = {}
    refused: dict[str, str] = {}
    for name in names:
        try:
            transport = transports.load(name)(endpoint)
            handles[name] = transport.register(blocks.pool)
        except FleetError as error:
            refused[name] = str(error)
            continue
        made[name] = transport
    return made, OwnerReady(endpoint.host, endpoint.port, 0, handles, refused)


def stream(listener: socket.socket, token: bytes, view: memoryview) -> None:
    """Serve contiguous bytes: one connection, 1 MiB at a time, as many as asked for; the ceiling of one TCP stream."""
    with contextlib.suppress(OSError):
        connected, _ = listener.accept()
        with connected:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if not hmac.compare_digest(connected.recv(len(token), socket.MSG_WAITALL), token):
                return
            while len(asked := connected.recv(8, socket.MSG_WAITALL)) == 8:
                left = int.from_bytes(asked, "little")
                for start in range(0, left, STREAM_BYTES):
                    connected.sendall(view[start : min(left, start + STREAM_BYTES)])


def main() -> None:
    settings = msgspec.json.decode(sys.stdin.readline().encode(), type=OwnerSettings)
    token = bytes.fromhex(settings.token)
    endpoint = Endpoint(sockets.listen("127.0.0.1", 0, setting="bench"), Credentials(FLEET, token))
    integrity.serve(endpoint)
    blocks = make_blocks(settings.nbytes, settings.cuda, filled=True)
    made, ready = register(settings.transports, endpoint, blocks)
    if settings.cuda is None:
        listener = sockets.listen("127.0.0.1", 0, setting="bench")
        view = memoryview(blocks.memory.reshape(-1))
        threading.Thread(target=stream, args=(listener, token, view), daemon=True).start()
        ready = msgspec.structs.replace(ready, stream_port=int(listener.getsockname()[1]))
    endpoint.start()
    print(msgspec.json.encode(ready).decode(), flush=True)
    for line in sys.stdin:
        if line.strip() == "cpu":
            print(json.dumps(time.process_time()), flush=True)
    for transport in made.values():
        transport.close()
    endpoint.close()


if __name__ == "__main__":
    main()
