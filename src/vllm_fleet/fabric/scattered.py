"""Scattered bytes of a pool to and from a connection, whatever memory they are in."""

from __future__ import annotations

from typing import Protocol

from vllm_fleet.fabric.contract import KVPool
from vllm_fleet.fabric.plan import Ints
from vllm_fleet.net.channel import Channel
from vllm_fleet.net.scatter import receive_runs, send_runs


class Bytes(Protocol):
    """One kind of memory. For one connection and one thread at a time."""

    cuda: int | None

    def send(self, channel: Channel, addresses: Ints, nbytes: Ints, idle_s: float) -> None: ...
    def receive(self, channel: Channel, addresses: Ints, nbytes: Ints, idle_s: float) -> None: ...
    def close(self) -> None: ...


class HostBytes:
    """CPU memory: straight from and into it."""

    cuda: int | None = None

    def send(self, channel: Channel, addresses: Ints, nbytes: Ints, idle_s: float) -> None:
        send_runs(channel.socket, addresses, nbytes, idle_s, channel.peer)

    def receive(self, channel: Channel, addresses: Ints, nbytes: Ints, idle_s: float) -> None:
        receive_runs(channel.socket, addresses, nbytes, idle_s, channel.peer)

    def close(self) -> None:
        """Nothing is kept."""


def bytes_of(pool: KVPool) -> Bytes:
    """The way to a pool's kind of memory. ConfigError names what a GPU pool needs installed."""
    if pool.cuda is None:
        return HostBytes()
    from vllm_fleet.fabric.transports.cuda.sockets import StagedBytes

    return StagedBytes(pool.cuda)
