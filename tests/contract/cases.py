"""The transports under test, what each needs, and why one cannot run here."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from vllm_fleet.fabric import transports
from vllm_fleet.fabric.contract import TransportFactory
from vllm_fleet.fabric.faults import Delay, Reorder, Rule, Script
from vllm_fleet.fabric.transports.faulty import faulty

HARMLESS = Script(
    transfers=(Rule(Delay(0.002), probability=0.5), Rule(Reorder(3), probability=0.7)),
    connects=(Rule(Delay(0.002)),),
    seed=5,
)
"""Faults after which every transfer is still correct."""


@dataclass(frozen=True)
class Case:
    """One transport of the suite."""

    name: str
    loads: str
    """The transport's name in fabric/transports."""
    one_process: bool = False
    """Reaches peers in its own process only."""
    network: bool = False
    """Runs between two hosts (network namespaces)."""
    proxied: bool = False
    """Its handle is a TcpDetails, so that a test can put a proxy in between."""
    gpus: int = 0
    """CUDA devices it needs; its pools are then in CUDA memory."""
    library: str | None = None
    run_bytes: int = 1
    """Runs start at, and are, multiples of this."""
    script: Script | None = None
    options: tuple[tuple[str, object], ...] = ()
    """Keywords of the transport's constructor."""
    settles: bool = False
    """Its library opens files at first use that stay open as long as the process lives."""

    def factory(self) -> TransportFactory:
        """Makes the transport."""
        inner = transports.load(self.loads)
        if self.options:
            inner = functools.partial(inner, **dict(self.options))
        return inner if self.script is None else faulty(inner, self.script)

    def missing(self) -> str | None:
        """Why it cannot run on this machine; None when it can."""
        if self.library is not None and importlib.util.find_spec(self.library) is None:
            return f"{self.name}: the library {self.library} is not installed"
        devices = len(list(Path("/dev").glob("nvidia[0-9]*")))
        if devices < self.gpus:
            return f"{self.name}: needs {self.gpus} CUDA devices, this machine has {devices}"
        return None

    def device(self, *, peer: bool) -> int | None:
        """The CUDA device of one side's pools; the two sides have different ones where there are two."""
        if not self.gpus:
            return None
        return 1 if peer and len(list(Path("/dev").glob("nvidia[0-9]*"))) > 1 else 0


ALL = [
    Case("memory", "memory", one_process=True),
    Case("cma", "cma"),
    Case("tcp", "tcp", network=True, proxied=True),
    Case("faulty", "tcp", proxied=True, script=HARMLESS),
    Case("nixl", "nixl", library="nixl"),  # two namespaces of one kernel are one host for UCX: it takes no cable
    Case("nixl_tcp", "nixl", network=True, library="nixl", options=(("ucx", {"TLS": "tcp"}),)),
    Case("mooncake", "mooncake", network=True, library="mooncake", settles=True),
    Case("cuda_ipc", "cuda_ipc", gpus=1, library="torch", run_bytes=16),
    Case("nccl", "nccl", gpus=2, library="nccl", run_bytes=16, settles=True),
    Case("tcp_cuda", "tcp", gpus=1, library="torch"),
]
CASES = {case.name: case for case in ALL if case.loads in transports.TRANSPORTS}
