"""One of several processes that share a router's port: where it is among the others."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path

from vllm_fleet.core import limits
from vllm_fleet.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Worker:
    """``folder``: where each has its unix socket, for questions about all of them."""

    index: int
    count: int
    folder: Path

    def socket_path(self, index: int) -> str:
        """The unix socket of one of them."""
        return str(self.folder / f"{index}.sock")

    @property
    def own_socket(self) -> str:
        """This one's unix socket."""
        return self.socket_path(self.index)

    @property
    def other_sockets(self) -> list[str]:
        """The unix sockets of all others."""
        return [self.socket_path(index) for index in range(self.count) if index != self.index]


def check_folder(folder: Path) -> None:
    """ConfigError when sockets in ``folder`` would have longer names than there can be."""
    if len(os.fsencode(folder)) + len(f"/{limits.ROUTER_WORKERS_MAX}.sock") > limits.SOCKET_PATH_LEN_MAX:
        raise ConfigError(f"router.workers: the folder's path is too long for sockets in it: {folder}")


def stop_with_parent(stop: asyncio.Event) -> None:
    """Set ``stop`` when the process that started this one is gone: it holds the other end of our standard input."""
    loop = asyncio.get_running_loop()

    def on_input() -> None:
        if not os.read(0, 4096):
            loop.remove_reader(0)
            stop.set()

    loop.add_reader(0, on_input)
