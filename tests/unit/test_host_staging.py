"""Pinned staging between a GPU pool and a socket: what goes where and when, with the GPU's part played by memmove."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")
pytest.importorskip("torch")
import torch

from vllm_fleet.fabric.transports.cuda import staging
from vllm_fleet.fabric.transports.cuda.staging import HostReader, HostWriter


class FakeGpu:
    """Copies late: when somebody waits for an event, and then everything that was enqueued before it."""

    def __init__(self) -> None:
        self.enqueued: list[tuple[int, int, int]] = []

    def run(self) -> bool:
        for target, source, nbytes in self.enqueued:
            ctypes.memmove(target, source, nbytes)
        self.enqueued.clear()
        return True

    def start(self, sources: Any, targets: Any, nbytes: Any) -> None:
        runs = zip(targets.tolist(), sources.tolist(), nbytes.tolist(), strict=True)
        self.enqueued += runs

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self.enqueued.append((target, source, nbytes))


class FakePinned:
    def __init__(self, device: int, nbytes: int) -> None:
        self.words = np.zeros(nbytes // 8, np.int64)
        self.address = int(self.words.ctypes.data)

    def close(self) -> None:
        self.words[:] = -1


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    fake = FakeGpu()
    nothing = contextlib.nullcontext()
    closed: list[object] = []
    own = SimpleNamespace(cuda_stream=0, close=lambda: closed.append(1))
    driver = SimpleNamespace(
        Stream=lambda device: own,
        Pinned=FakePinned,
        current=lambda device: nothing,
        copy_in=fake.copy,
        copy_out=fake.copy,
    )
    monkeypatch.setattr(staging, "driver", driver)
    queue = SimpleNamespace(start=fake.start, close=lambda: None)
    monkeypatch.setattr(staging, "CopyQueue", lambda device, stream: queue)
    monkeypatch.setattr(torch, "device", lambda kind, index: "cpu")
    cuda = {
        "device": lambda device: nothing,
        "ExternalStream": lambda stream, device: None,
        "current_stream": lambda device: SimpleNamespace(synchronize=lambda: None),
        "Event": lambda: SimpleNamespace(record=lambda stream: None, query=fake.run),
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    yield fake
    assert not fake.enqueued, "something was left under way"
    assert closed, "a stream was not given back"


def runs_of(memory: Any, order: Any, size: int) -> tuple[Any, Any]:
    return int(memory.ctypes.data) + order.astype(np.int64) * size, np.full(len(order), size, np.int64)


@pytest.mark.parametrize("count", [0, 1, 40])
def test_bytes_go_through_in_order_in_any_portions(gpu: FakeGpu, count: int) -> None:
    rng = np.random.default_rng(count)
    source, target = rng.integers(0, 256, (64, 100), np.uint8), np.zeros((64, 100), np.uint8)
    read, write = rng.permutation(64)[:count], rng.permutation(64)[:count]
    reader, writer = HostReader(0, chunk_bytes=256), HostWriter(0, chunk_bytes=300)
    for _ in range(2):
        writer.begin(*runs_of(target, write, 100))
        sent = b"".join(bytes(chunk) for chunk in reader.chunks(*runs_of(source, read, 100)))
        assert sent == source[read].tobytes()
        while not writer.is_full():
            into = writer.buffer()
            took = int(rng.integers(1, len(into) + 1))
            into[:took], sent = sent[:took], sent[took:]
            writer.commit(took)
        assert not sent
        writer.finish()
        assert (target[write] == source[read]).all()
        assert not np.delete(target, write, axis=0).any()
        target[:] = 0
    with contextlib.closing(reader):
        list(reader.chunks(*runs_of(source, np.array([1]), 100)))
    writer.begin(*runs_of(target, write, 100))
    writer.close()


def test_an_abandoned_transfer_leaves_nothing_under_way(gpu: FakeGpu) -> None:
    source, target = np.ones((64, 100), np.uint8), np.zeros((64, 100), np.uint8)
    everything = np.arange(0, 64, 2)
    reader, writer = HostReader(0, chunk_bytes=256), HostWriter(0, chunk_bytes=256)
    with contextlib.closing(reader.chunks(*runs_of(source, everything, 100))) as chunks:
        next(chunks)
    assert not gpu.enqueued
    writer.begin(*runs_of(target, everything, 100))
    for _ in range(2):
        writer.commit(len(writer.buffer()))
    writer.abandon()
    assert not gpu.enqueued
    assert writer.is_full()
    reader.close()
    writer.close()
