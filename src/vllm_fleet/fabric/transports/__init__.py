"""The transports by name: strings until used, so that a missing library is met only by those who ask for it.

Around any of them: ``faulty(load(name), script)`` of fabric/transports/faulty.py, for tests.
"""

from __future__ import annotations

import importlib

from vllm_fleet.core.errors import ConfigError
from vllm_fleet.fabric.contract import TransportFactory

TRANSPORTS = {
    "cma": "vllm_fleet.fabric.transports.cma:CmaTransport",
    "cuda_ipc": "vllm_fleet.fabric.transports.cuda_ipc:CudaIpcTransport",
    "memory": "vllm_fleet.fabric.transports.memory:MemoryTransport",
    "mooncake": "vllm_fleet.fabric.transports.mooncake:MooncakeTransport",
    "nccl": "vllm_fleet.fabric.transports.nccl:NcclTransport",
    "nixl": "vllm_fleet.fabric.transports.nixl:NixlTransport",
    "tcp": "vllm_fleet.fabric.transports.tcp:TcpTransport",
}


def load(name: str) -> TransportFactory:
    """The class of the transport called ``name``; ConfigError when there is none."""
    if name not in TRANSPORTS:
        raise ConfigError(f"fabric.transports: no transport {name!r}; known are {', '.join(sorted(TRANSPORTS))}")
    module, _, attribute = TRANSPORTS[name].partition(":")
    factory: TransportFactory = getattr(importlib.import_module(module), attribute)
    return factory
