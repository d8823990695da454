"""Link selection: the best transport that works, reasons for those passed over, and what is remembered."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import pytest

from vllm_fleet.core import log
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import ConfigError, LinkError
from vllm_fleet.fabric import select
from vllm_fleet.fabric.contract import KVPool, Link, Transport
from vllm_fleet.fabric.endpoint import Endpoint
from vllm_fleet.fabric.select import LinkSelector, auto_order, register_all
from vllm_fleet.wire.fabric import PoolHandle


@dataclass
class Fake:
    """A transport that connects, or says why not."""

    name: str
    error: str | None = None
    tried: list[str] = field(default_factory=list)
    allowed_s: list[float] = field(default_factory=list)

    def connect(self, handle: PoolHandle, deadline: Deadline) -> Link:
        self.tried.append(handle.pool)
        self.allowed_s.append(deadline.remaining())
        if self.error is not None:
            raise LinkError(self.error)
        return cast(Link, self)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def selector(*fakes: Fake) -> tuple[LinkSelector, Clock]:
    clock = Clock()
    return LinkSelector({fake.name: cast(Transport, fake) for fake in fakes}, clock), clock


def handles(*names: str, life: int = 1) -> list[PoolHandle]:
    return [PoolHandle(name, f"{name}-{life}", (1,)) for name in names]


def soon(seconds: float = 10.0) -> Deadline:
    return Deadline.after(seconds, "test")


def test_the_first_that_works_in_our_order_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[str, dict[str, object]]] = []
    monkeypatch.setattr(log, "event", lambda name, **values: logged.append((name, values)))
    cma, nixl, tcp = Fake("cma", "another host"), Fake("nixl"), Fake("tcp")
    chooser, _ = selector(cma, nixl, tcp)
    chosen = chooser.choose(handles("tcp", "cma"), "peer", soon())
    assert chosen.link is cast(Link, tcp)
    assert chosen.handle.pool == "tcp-1"
    passed_over = {"cma": "another host", "nixl": "the peer does not offer it"}
    assert logged == [("link.chosen", {"peer": "peer", "transport": "tcp", "passed_over": passed_over})]
    assert nixl.tried == []


def test_a_refusal_is_remembered_for_a_while_and_for_that_registration_only() -> None:
    slow, tcp = Fake("nixl", "no route"), Fake("tcp")
    chooser, clock = selector(slow, tcp)
    for _ in range(3):
        chooser.choose(handles("nixl", "tcp"), "peer", soon())
    assert slow.tried == ["nixl-1"]
    chooser.choose(handles("nixl", "tcp", life=2), "peer", soon())
    assert slow.tried == ["nixl-1", "nixl-2"]
    clock.now = select.REMEMBER_S + 1
    slow.error = None
    assert chooser.choose(handles("nixl", "tcp"), "peer", soon()).link is cast(Link, slow)


def test_with_nothing_left_every_reason_is_given_and_all_are_tried_again() -> None:
    one, two = Fake("cma", "other user"), Fake("tcp", "refused")
    chooser, _ = selector(one, two)
    for _ in range(2):
        with pytest.raises(LinkError, match=r"no link to peer: cma: other user; tcp: refused"):
            chooser.choose(handles("cma", "tcp"), "peer", soon())
    assert len(one.tried) == len(two.tried) == 2
    with pytest.raises(LinkError, match="no transport is allowed"):
        LinkSelector({}).choose([], "peer", soon())


def test_one_transport_may_not_use_up_the_time_of_the_others() -> None:
    stalling, tcp = Fake("nixl", "timed out"), Fake("tcp")
    selector(stalling, tcp)[0].choose(handles("nixl", "tcp"), "peer", soon(60))
    assert stalling.allowed_s[0] <= select.PROBE_S


@pytest.mark.parametrize(
    ("cuda", "rdma", "wanted"),
    [
        (False, False, ("cma", "tcp")),
        (False, True, ("cma", "nixl", "mooncake", "tcp")),
        (True, False, ("cuda_ipc", "nccl", "tcp")),
        (True, True, ("cuda_ipc", "nixl", "mooncake", "nccl", "tcp")),
    ],
)
def test_what_auto_stands_for(cuda: bool, rdma: bool, wanted: tuple[str, ...]) -> None:
    assert auto_order(cuda=cuda, rdma=rdma) == wanted


class Registering:
    """Transports that can or cannot take a pool, by name."""

    def __init__(self, broken: dict[str, Exception]) -> None:
        self.broken = broken

    def load(self, name: str):  # type: ignore[no-untyped-def]
        def make(endpoint: Endpoint) -> Registering:
            if name in self.broken:
                raise self.broken[name]
            return self

        self.name = name
        return make

    def register(self, pool: KVPool) -> PoolHandle:
        return PoolHandle(self.name, self.name, ())


def test_auto_goes_on_without_what_cannot_be_had_but_a_named_one_stops_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken: dict[str, Exception] = {"cma": LinkError("no process_vm_readv")}
    monkeypatch.setattr(select, "registry", Registering(broken))
    monkeypatch.setattr(select, "has_rdma", lambda: False)
    endpoint, pool = cast(Endpoint, None), KVPool(())
    made, offered = register_all(("auto",), endpoint, pool)
    assert (list(made), [handle.transport for handle in offered]) == (["tcp"], ["tcp"])
    with pytest.raises(ConfigError, match=r"fabric\.transports: cma cannot be used here: no process_vm_readv"):
        register_all(("cma", "tcp"), endpoint, pool)
    broken["tcp"] = ConfigError("missing")
    with pytest.raises(ConfigError, match="none can be used here"):
        register_all(("auto",), endpoint, pool)
