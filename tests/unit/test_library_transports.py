"""What nixl and mooncake decide before a library moves anything: settings, the way of reads, missing libraries."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pytest

from tests.contract.pools import REGIONS, make_memory
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import ConfigError, LinkError
from vllm_fleet.fabric import machine
from vllm_fleet.fabric.contract import KVPool, TransferError
from vllm_fleet.fabric.endpoint import Endpoint
from vllm_fleet.fabric.plan import BlockCopyPlan, BlockShape, plan_blocks
from vllm_fleet.fabric.transports import mooncake, nixl_handle
from vllm_fleet.fabric.transports.mooncake import MooncakeTransport
from vllm_fleet.fabric.transports.nixl import NixlTransport
from vllm_fleet.fabric.transports.nixl_agent import ucx_options
from vllm_fleet.fabric.transports.nixl_handle import MachineFacts, can_pull, settle
from vllm_fleet.net import sockets
from vllm_fleet.net.channel import Credentials

HERE, THERE = MachineFacts("a", False, False), MachineFacts("b", False, False)
HERE_RDMA, THERE_RDMA = MachineFacts("a", True, False), MachineFacts("b", True, False)
HERE_TCP = MachineFacts("a", True, True)


def plan(grant: str, sources: list[int], targets: list[int]) -> BlockCopyPlan:
    return plan_blocks([BlockShape(4096, 4096, 64)] * REGIONS, sources, targets, grant)


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint(sockets.listen("127.0.0.1", 0, setting="test"), Credentials("test", bytes(32)))
    made.start()
    yield made
    made.close()


@pytest.mark.parametrize(
    ("own", "theirs", "pulls"),
    [
        (HERE, HERE, True),
        (HERE, THERE, False),
        (HERE_RDMA, THERE_RDMA, True),
        (HERE_RDMA, THERE, False),
        (HERE_TCP, HERE_RDMA, False),
        (HERE, HERE_TCP, False),
    ],
)
def test_reads_are_pulled_only_where_ucx_needs_no_help(own: MachineFacts, theirs: MachineFacts, pulls: bool) -> None:
    assert can_pull(own, theirs) is pulls


def test_ucx_settings_are_bound_to_the_endpoints_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settle({}, "127.0.0.1") == {"NET_DEVICES": "lo"}
    assert settle({"TLS": "tcp"}, "127.0.0.1") == {"TLS": "tcp", "NET_DEVICES": "lo"}
    assert settle({"NET_DEVICES": "mlx5_0:1"}, "127.0.0.1") == {"NET_DEVICES": "mlx5_0:1"}
    assert settle({}, "a-host-name") == {}
    monkeypatch.setattr(nixl_handle, "interface_of", lambda host: "eth7")
    monkeypatch.setattr(nixl_handle, "has_rdma", lambda: False)
    assert settle({}, "192.0.2.1") == {"NET_DEVICES": "eth7"}
    monkeypatch.setattr(nixl_handle, "has_rdma", lambda: True)
    assert settle({}, "192.0.2.1") == {}, "binding to a network interface would leave the RDMA devices out"


def test_no_interface_has_a_foreign_address() -> None:
    assert machine.interface_of("192.0.2.250") is None
    assert machine.interface_of("127.0.0.1") == "lo"


def test_ucx_options() -> None:
    assert ucx_options({}) == {}
    assert ucx_options({"TLS": "tcp", "NET_DEVICES": "lo"}) == {"engine_config": "TLS=tcp,NET_DEVICES=lo"}
    with pytest.raises(ConfigError, match="comma"):
        ucx_options({"TLS": "tcp,shm"})


@pytest.mark.parametrize(("name", "module"), [("nixl", "nixl"), ("mooncake", "mooncake.engine")])
def test_a_missing_library_names_the_extra(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"pip install 'vllm-fleet\[{name}\]'"):
        (NixlTransport if name == "nixl" else MooncakeTransport)(endpoint)


def test_mooncake_refuses_rdma_where_there_is_none(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mooncake", reason="the library mooncake is not installed")
    monkeypatch.setattr(mooncake, "has_rdma", lambda: False)
    with pytest.raises(ConfigError, match="needs an RDMA device"):
        MooncakeTransport(endpoint, protocol="rdma")


def test_mooncake_for_the_cpu_refuses_cuda_memory(endpoint: Endpoint) -> None:
    engine = pytest.importorskip("mooncake.engine", reason="the library mooncake is not installed")
    if engine.SUPPORT_CUDA:
        pytest.skip("this build of mooncake moves CUDA memory")
    with pytest.raises(LinkError, match="mooncake-transfer-engine-non-cuda"):
        MooncakeTransport(endpoint).register(KVPool((), cuda=0))


def test_nixl_over_tcp_only_reads_by_pushes_and_writes(endpoint: Endpoint) -> None:
    """Both sides in this process: UCX over TCP, where a pulled read could end the owner's process."""
    pytest.importorskip("nixl", reason="the library nixl is not installed")
    other = Endpoint(sockets.listen("127.0.0.1", 0, setting="test"), Credentials("test", bytes(32)))
    other.allow_write = lambda grant, regions, offsets, nbytes: grant == "writer"
    owner = NixlTransport(other, ucx={"TLS": "tcp"})
    reader = NixlTransport(endpoint, ucx={"TLS": "tcp"})
    try:
        theirs, ours = make_memory(64, 4096, cuda=None), make_memory(64, 4096, cuda=None)
        rng = np.random.default_rng(3)
        content = [rng.integers(0, 256, (64, 4096), np.uint8) for _ in theirs.pool.regions]
        theirs.fill(content)
        handle = owner.register(theirs.pool)
        other.start()
        reader.register(ours.pool)
        blocks = rng.permutation(64).tolist()
        link = reader.connect(handle, Deadline.after(10, "test"))
        link.read(plan("reader", blocks, blocks)).wait(Deadline.after(10, "test"))
        link.write(plan("writer", [63], [0])).wait(Deadline.after(10, "test"))
        with pytest.raises(TransferError, match="not_granted"):
            link.write(plan("reader", [63], [1])).wait(Deadline.after(10, "test"))
        for got, had in zip(ours.read_back(), content, strict=True):
            assert (got == had).all()
        for got, had in zip(theirs.read_back(), content, strict=True):
            assert (got[0] == had[63]).all()
            assert (got[1:] == had[1:]).all()
    finally:
        reader.close()
        owner.close()
        other.close()
