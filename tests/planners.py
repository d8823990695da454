"""Plans for supervisors whose processes are tiny programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

from vllm_fleet.launcher.gpus import Gpus
from vllm_fleet.launcher.spec import ProcessSpec
from vllm_fleet.net import sockets
from vllm_fleet.wire.control import Slot
from vllm_fleet.wire.names import Role

Make = Callable[[Mapping[str, int]], tuple[ProcessSpec, ...]]


class StaticPlanner:
    """Every process of ``make(ports)``; an instance it does not know is planned by ``more``."""

    def __init__(
        self, make: Make, ports: Mapping[str, int], more: Callable[[str, Role, int], ProcessSpec] | None = None
    ) -> None:
        self.gpus = Gpus()
        self.ports = dict(ports)
        self._make, self._more = make, more

    def first(self) -> tuple[Slot, ...]:
        return tuple(Slot(spec.name, cast(Role, spec.role)) for spec in self._specs() if spec.kind == "instance")

    def own(self) -> tuple[ProcessSpec, ...]:
        return tuple(spec for spec in self._specs() if spec.kind != "instance")

    def instance(self, name: str, role: Role, gpus: str | None) -> ProcessSpec:
        known = next((spec for spec in self._specs() if spec.name == name), None)
        if known is not None:
            return known
        assert self._more is not None, name
        port = self.ports.setdefault(name, sockets.free_port("127.0.0.1"))
        return self._more(name, role, port)

    def repick(self, name: str) -> None:
        self.ports[name] = sockets.free_port("127.0.0.1")

    def forget(self, name: str) -> None:
        self.ports.pop(name, None)

    def gpus_of(self, role: Role) -> int:
        return 1

    def _specs(self) -> tuple[ProcessSpec, ...]:
        return self._make(self.ports)
