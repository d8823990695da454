"""A worker of a group, as a process of its own; it takes one JSON command per line on stdin and answers each with one.

python -m tests.contract.group_worker URL BEARER BACKEND [DEVICE]

Commands: {"do": "form" | "broadcast" | "send" | "receive" | "use" | "wait" | "reset" | ...}; see Worker.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from typing import Any

import torch

from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import FleetError
from vllm_fleet.fabric.groups import controlled
from vllm_fleet.fabric.groups.group import Group
from vllm_fleet.fabric.transports import group_gloo
from vllm_fleet.net.groups_client import GroupsClient


def backend(name: str, device: int) -> Any:
    if name == "gloo":
        return group_gloo.GlooBackend()
    from vllm_fleet.fabric.transports.group_nccl import NcclBackend

    return NcclBackend(device)


class Worker:
    """Groups by name; tensors are of one byte value, which tells what arrived."""

    def __init__(self, url: str, bearer: str, library: str, device: int) -> None:
        self.library, self.number = library, device
        self.client = GroupsClient(url, bearer)
        self.device = "cpu" if library == "gloo" else f"cuda:{device}"
        self.groups: dict[str, Group[Any]] = {}

    def do(self, command: dict[str, Any]) -> Any:
        what = command.pop("do")
        return getattr(self, f"do_{what}")(**command)

    def do_use(self, name: str, group: str, members: list[str], least: int = 2, gather_s: float = 1.0) -> str:
        """Have a group, or (named "pair") a pair with the other one."""
        who = controlled.attendee(name)
        if group == "pair":
            rendezvous = controlled.pair(self.client, who, next(one for one in members if one != name))
        else:
            rendezvous = controlled.group(self.client, group, who, members, least, gather_s)
        self.groups[group] = Group(rendezvous, backend(self.library, self.number))
        return who.life

    def do_form(self, group: str, seconds: float = 20.0, dies: bool = False, stops: bool = False) -> Any:
        """Form; answers its epoch, members, rank and how long it took. ``dies``: as soon as the others can join."""
        began = time.monotonic()
        formed = self.groups[group]
        if dies or stops:
            number = signal.SIGKILL if dies else signal.SIGSTOP
            library: Any = formed._backend
            library.join = lambda *given: os.kill(os.getpid(), number)
        meeting = formed.form(Deadline.after(seconds, "test"))
        return {
            "epoch": meeting.epoch, "members": meeting.members, "rank": meeting.rank, "id": meeting.group_id.hex(),
            "s": time.monotonic() - began,
        }  # fmt: skip

    def do_broadcast(self, group: str, root: int, value: int, nbytes: int = 1 << 20, seconds: float = 20.0) -> Any:
        tensor = self._tensor(value, nbytes)
        self.groups[group].broadcast(tensor, root, Deadline.after(seconds, "test"))
        return self._value(tensor)

    def do_timed_broadcast(self, group: str, root: int, value: int, nbytes: int) -> Any:
        """What arrived, and the seconds that it took once all were ready."""
        tensor = self._tensor(value, nbytes)
        warm = self._tensor(0, 1)
        self.groups[group].broadcast(warm, 0, Deadline.after(20.0, "test"))
        began = time.monotonic()
        self.groups[group].broadcast(tensor, root, Deadline.after(20.0, "test"))
        return {"s": time.monotonic() - began, "value": self._value(tensor)}

    def do_broadcasts(self, group: str, times: int, nbytes: int) -> int:
        """Broadcast from rank 0 again and again; how often it went well."""
        for number in range(times):
            rank = self.groups[group].meeting.rank
            value = number % 251
            tensor = self._tensor(value if rank == 0 else 255, nbytes)
            self.groups[group].broadcast(tensor, 0, Deadline.after(20.0, "test"))
            assert self._value(tensor) == value, number
            if number == 2:
                print(json.dumps({"note": "busy"}), flush=True)
        return times

    def do_send(self, group: str, to: int, value: int, nbytes: int = 1 << 20, seconds: float = 20.0) -> None:
        self.groups[group].send(self._tensor(value, nbytes), to, Deadline.after(seconds, "test"))

    def do_receive(self, group: str, source: int, nbytes: int = 1 << 20, seconds: float = 20.0) -> Any:
        tensor = self._tensor(255, nbytes)
        self.groups[group].receive(tensor, source, Deadline.after(seconds, "test"))
        return self._value(tensor)

    def do_wait(self, group: str, seconds: float = 20.0) -> Any:
        """Until the epoch is over: when that was noticed (a clock that all processes share), and why it was."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                self.groups[group].check()
            except FleetError as error:
                return {"at": time.monotonic(), "reason": str(error)}
            time.sleep(0.001)
        return None

    def do_stands(self, group: str) -> bool:
        """Whether the epoch lives, as far as this worker has heard."""
        self.groups[group].check()
        return True

    def do_status(self, group: str) -> Any:
        rendezvous = self.groups[group]._rendezvous
        return self.client.status(rendezvous.group, Deadline.after(5.0, "test")).state

    def do_threads(self) -> Any:
        """Threads of this process, and those of gloo's communicators."""
        return [threading.active_count(), group_gloo.threads_alive()]

    def do_reset(self) -> None:
        """Close every group."""
        for group in list(self.groups):
            self.do_close(group)

    def do_close(self, group: str) -> None:
        self.groups.pop(group).close()

    def _tensor(self, value: int, nbytes: int) -> torch.Tensor:
        return torch.full((nbytes,), value, dtype=torch.uint8, device=self.device)

    @staticmethod
    def _value(tensor: torch.Tensor) -> int:
        assert bool((tensor == tensor[0]).all()), "parts of different tensors"
        return int(tensor[0])


def main() -> None:
    url, bearer, library = sys.argv[1:4]
    device = int(sys.argv[4]) if len(sys.argv) > 4 else 0
    worker = Worker(url, bearer, library, device)
    torch.set_num_threads(1)
    if library == "nccl":
        torch.cuda.set_device(device)
        torch.zeros(1, device="cuda")
    print(json.dumps({"note": "ready"}), flush=True)
    for line in sys.stdin:
        try:
            answer = {"answer": worker.do(json.loads(line))}
        except FleetError as error:
            answer = {"error": type(error).__name__, "text": str(error)}
        print(json.dumps({**answer, "at": time.monotonic()}), flush=True)


if __name__ == "__main__":
    main()
