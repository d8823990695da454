"""Decode's half of a worker: a request's load ends once, when all its parts have, whatever becomes of each."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator

import pytest

from tests.unit.kv_workers import SOON_S, TOKENS, Decode, Prefill, Stage, a_load
from vllm_fleet.connector.intake import Ended, PeerLoad
from vllm_fleet.connector.jobs import LoadJob
from vllm_fleet.connector.loader import Loader
from vllm_fleet.connector.split import Ranks, split_load
from vllm_fleet.core import limits
from vllm_fleet.wire import fabric as wire
from vllm_fleet.wire.ticket import WorkerAddress

THEIRS, OURS = (5, 9, 2, 7), (20, 21, 22, 23)


class Worker:
    """A decode worker's loader and its pool."""

    def __init__(self, decode: Decode) -> None:
        self.decode = decode
        self.changed = threading.Condition()
        self.loader = Loader(decode.own, self.changed, load_s=SOON_S, prefill_s=60.0)

    def ended(self) -> list[list[Ended]]:
        """Waits until the loader says that a load has ended."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.loader.has_ended, SOON_S)
        return self.loader.take_ended()

    def one(self) -> list[Ended]:
        """The parts of the only load that has ended."""
        [parts] = self.ended()
        assert not self.loader.has_ended
        return parts

    def close(self) -> None:
        self.loader.close()


@pytest.fixture
def stage() -> Iterator[Stage]:
    made = Stage()
    yield made
    made.close()


def worker(stage: Stage, decode: Decode) -> Worker:
    return stage.keep(Worker(decode))


def two_parts(first: Prefill, second: Prefill) -> list[tuple[WorkerAddress, PeerLoad]]:
    """One rank of ours with four heads, two ranks of theirs with two each."""
    workers = (first.address, second.address)
    job = LoadJob("t", "request", workers, first.engine, b"p" * 32, 16, OURS, 0, streamed=True)
    return split_load(job, Ranks(1, 4, TOKENS), 0, {64})


def test_one_part(stage: Stage) -> None:
    prefill, own = stage.keep(Prefill()), worker(stage, stage.keep(Decode()))
    prefill.hold("t", THEIRS, 16)
    own.loader.load([(prefill.address, a_load(request="request"))])
    [ended] = own.one()
    assert (ended.request, ended.error, ended.blocks) == ("request", None, OURS)
    assert own.decode.has(prefill, THEIRS, OURS)
    assert own.loader.take_ended() == []


def test_two_parts_end_together_with_the_bytes_of_both(stage: Stage) -> None:
    prefills = [stage.keep(Prefill(block_bytes=32, seed=seed)) for seed in (1, 2)]
    own = worker(stage, stage.keep(Decode(block_bytes=64)))
    own.loader.load(two_parts(*prefills))
    prefills[0].step("t", THEIRS, 16)
    prefills[0].asked(wire.Close("t", taken=True))
    assert not own.loader.has_ended, "the other half is missing"
    prefills[1].step("t", THEIRS[:1], 4)
    prefills[1].step("t", THEIRS[1:], 16)
    parts = own.one()
    assert [(part.request, part.error) for part in parts] == [("request", None)] * 2
    for region, got in enumerate(own.decode.read_back()):
        for rank, prefill in enumerate(prefills):
            wanted = prefill.wanted[region][list(THEIRS)]
            assert (got[list(OURS), 32 * rank : 32 * rank + 32] == wanted).all()


def test_a_part_that_fails_ends_the_other_one(stage: Stage) -> None:
    prefills = [stage.keep(Prefill(block_bytes=32)) for _ in range(2)]
    own = worker(stage, stage.keep(Decode(block_bytes=64)))
    own.loader.load(two_parts(*prefills))
    for prefill in prefills:
        prefill.asked(wire.Open)
        prefill.step("t", THEIRS[:1], 4)
    prefills[1].revoke("t")
    parts = own.one()
    assert sorted((part.peer, part.reason) for part in parts) == sorted(
        (f"127.0.0.1:{prefill.address.port}", reason)
        for prefill, reason in zip(prefills, ("cancelled", "TransferError"), strict=True)
    )
    assert all(part.error is not None and part.blocks == OURS for part in parts)
    prefills[0].hold("t", THEIRS, 16)
    prefills[0].ended("t")  # it was given up
    assert not own.loader.has_ended


def test_a_peer_that_is_not_there_ends_the_other_part(stage: Stage) -> None:
    prefills = [stage.keep(Prefill(block_bytes=32)) for _ in range(2)]
    prefills[1].endpoint.close()
    own = worker(stage, stage.keep(Decode(block_bytes=64)))
    own.loader.load(two_parts(*prefills))
    parts = own.one()
    assert sorted(part.reason for part in parts) == ["PeerGone", "cancelled"]
    prefills[0].hold("t", THEIRS, 16)
    prefills[0].ended("t")


def test_both_parts_fail(stage: Stage) -> None:
    prefills = [stage.keep(Prefill(block_bytes=32)) for _ in range(2)]
    own = worker(stage, stage.keep(Decode(block_bytes=64)))
    own.loader.load(two_parts(*prefills))
    for prefill in prefills:
        prefill.asked(wire.Open)
        prefill.revoke("t")
    assert len(own.one()) == 2


def test_a_cancelled_request(stage: Stage) -> None:
    prefills = [stage.keep(Prefill(block_bytes=32)) for _ in range(2)]
    own = worker(stage, stage.keep(Decode(block_bytes=64)))
    own.loader.load(two_parts(*prefills))
    own.loader.cancel("request")
    assert [part.reason for part in own.one()] == ["cancelled"] * 2
    own.loader.cancel("request")
    own.loader.cancel("unknown")
    for prefill in prefills:
        prefill.hold("t", THEIRS, 16)
        prefill.ended("t")
    assert not own.loader.has_ended


def test_a_load_that_cannot_be_started(stage: Stage) -> None:
    own = worker(stage, stage.keep(Decode()))
    own.loader.fail("request", OURS, "what is wrong")
    [ended] = own.one()
    assert (ended.request, ended.blocks, ended.error, ended.reason) == ("request", OURS, "what is wrong", "BadRequest")


def test_a_transfer_that_is_given_up(stage: Stage) -> None:
    prefill, own = stage.keep(Prefill()), worker(stage, stage.keep(Decode()))
    prefill.hold("t", THEIRS, 16)
    own.loader.release("t", prefill.address)
    prefill.ended("t")
    assert not own.loader.has_ended


def test_loads_of_one_peer_and_of_several_end_one_by_one(stage: Stage) -> None:
    prefills = [stage.keep(Prefill()) for _ in range(2)]
    own = worker(stage, stage.keep(Decode()))
    names = [f"t{index}" for index in range(4)]
    for index, name in enumerate(names):
        blocks = tuple(range(4 * index, 4 * index + 4))
        own.loader.load([(prefills[index % 2].address, a_load(name, blocks=blocks))])
    seen: list[str] = []
    for index, name in reversed(list(enumerate(names))):
        prefills[index % 2].step(name, THEIRS, 16)
        [ended] = own.one()
        assert ended.error is None
        seen.append(ended.request)
    assert seen == names[::-1]


def test_the_oldest_peer_makes_room_and_its_loads_end(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PEERS_MAX", 1)
    prefills = [stage.keep(Prefill()) for _ in range(2)]
    own = worker(stage, stage.keep(Decode()))
    own.loader.load([(prefills[0].address, a_load("first"))])
    prefills[0].asked(wire.Open)
    prefills[1].hold("second", THEIRS, 16)
    own.loader.load([(prefills[1].address, dataclasses.replace(a_load("second"), blocks=(1, 2, 3, 4)))])
    ends: list[Ended] = []
    while len(ends) < 2:
        ends += [part for parts in own.ended() for part in parts]
    assert {end.request: end.error is None for end in ends} == {"first": False, "second": True}
