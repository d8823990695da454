"""One prefill worker seen from decode, over real connections: a load ends once, with the right bytes or an error."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.unit.kv_workers import PROMPT, TOKENS, Decode, Prefill, Stage, a_load, eventually
from vllm_fleet.connector import peer as peer_module
from vllm_fleet.connector.peer import Peer
from vllm_fleet.fabric.heads import HeadLayout, shares, slices
from vllm_fleet.fabric.select import Chosen, LinkSelector
from vllm_fleet.wire import fabric as wire
from vllm_fleet.wire.ticket import WorkerAddress

THEIRS, OURS = (5, 9, 2, 7), (20, 21, 22, 23)


@pytest.fixture
def stage() -> Iterator[Stage]:
    made = Stage()
    yield made
    made.close()


def arrived(prefill: Prefill, decode: Decode, theirs: tuple[int, ...], ours: tuple[int, ...]) -> None:
    """Wait until our blocks hold what theirs do."""
    eventually(f"blocks {theirs} did not come", lambda: decode.has(prefill, theirs, ours))


def streamed(prefill: Prefill, decode: Decode) -> None:
    """Compute four blocks, each only when the one before has arrived."""
    for done in range(1, 5):
        prefill.step("t", THEIRS[done - 1 : done], done * TOKENS)
        arrived(prefill, decode, THEIRS[:done], OURS[:done])


@pytest.mark.parametrize("transport", ["memory", "cma", "tcp"])
def test_kv_is_taken_while_it_is_computed(stage: Stage, transport: str) -> None:
    prefill, decode = stage.keep(Prefill(transport)), stage.keep(Decode(transport))
    stage.peer(prefill, decode).load(a_load())
    prefill.asked(wire.Open)
    streamed(prefill, decode)
    ended = decode.one()
    assert (ended.error, ended.request, ended.blocks, ended.transport) == (None, "t", OURS, transport)
    assert (ended.copies, ended.nbytes) == (4, 4 * 2 * 64)
    assert 0 < ended.wait_s <= ended.whole_s
    assert 0 < ended.copy_s <= ended.whole_s
    assert decode.used().tolist() == list(OURS), "nothing else was written to"
    prefill.hold("t", THEIRS, 16)
    prefill.ended("t")


def test_a_load_that_comes_while_it_is_computed(stage: Stage) -> None:
    prefill, decode = stage.keep(Prefill()), stage.keep(Decode())
    prefill.step("t", THEIRS[:2], 8)
    stage.peer(prefill, decode).load(a_load())
    arrived(prefill, decode, THEIRS[:2], OURS[:2])
    prefill.step("t", THEIRS[2:], 14)  # the last block is not full
    arrived(prefill, decode, THEIRS[:3], OURS[:3])
    assert decode.results == []
    prefill.step("t", (), 16)
    assert decode.one().error is None
    assert decode.has(prefill, THEIRS, OURS)


def test_a_partial_last_block_and_a_prefix_of_ours(stage: Stage) -> None:
    prefill, decode = stage.keep(Prefill()), stage.keep(Decode())
    stage.peer(prefill, decode).load(a_load(tokens=14, blocks=OURS[2:], skip=2))
    prefill.asked(wire.Open)
    prefill.step("t", THEIRS[:3], 12)
    prefill.step("t", THEIRS[3:], 14)
    ended = decode.one()
    assert (ended.error, ended.nbytes) == (None, 2 * 2 * 64)
    assert decode.has(prefill, THEIRS[2:], OURS[2:])
    assert decode.used().tolist() == list(OURS[2:])


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_finished_prefill(stage: Stage, is_streamed: bool) -> None:
    prefill, decode = stage.keep(Prefill()), stage.keep(Decode())
    prefill.hold("t", THEIRS, 16)
    stage.peer(prefill, decode).load(a_load(streamed=is_streamed))
    ended = decode.one()
    assert (ended.error, ended.copies) == (None, 1)
    assert decode.has(prefill, THEIRS, OURS)
    prefill.ended("t")


def test_a_prefill_that_is_held_shortly_after_it_is_asked_for(stage: Stage) -> None:
    prefill, decode = stage.keep(Prefill()), stage.keep(Decode())
    stage.peer(prefill, decode).load(a_load(streamed=False))
    prefill.asked(wire.Open)
    prefill.hold("t", THEIRS, 16)
    assert decode.one().error is None
    assert decode.has(prefill, THEIRS, OURS)
    prefill.ended("t")


def test_a_prefill_that_is_never_held(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_module, "BEGIN_S", 0.05)
    prefill, decode = stage.keep(Prefill()), stage.keep(Decode())
    stage.peer(prefill, decode).load(a_load(streamed=False))
    ended = decode.one()
    assert ended.reason == "DeadlineExceeded"
    assert "connector.peer.BEGIN_S" in str(ended.error)


def test_a_prefill_that_takes_too_long_to_compute(stage: Stage) -> None:
    prefill, decode = stage.keep(Prefill()), stage.keep(Decode())
    prefill.step("t", THEIRS[:2], 9)
    stage.peer(prefill, decode, prefill_s=0.1).load(a_load())
    ended = decode.one()
    assert ended.reason == "DeadlineExceeded"
    assert "handoff.prefill_s" in str(ended.error)
    assert "9 of 16 tokens" in str(ended.error)
    assert ended.blocks == OURS
    prefill.asked(wire.Close("t", taken=False))
    prefill.hold("t", THEIRS, 16)
    prefill.ended("t")


def test_cancelled_while_it_waits(stage: Stage) -> None:
    prefill, decode = stage.keep(Prefill()), stage.keep(Decode())
    peer = stage.peer(prefill, decode)
    job = peer.load(a_load())
    prefill.step("t", THEIRS[:1], 4)
    arrived(prefill, decode, THEIRS[:1], OURS[:1])
    peer.cancel(job)
    ended = decode.one()
    assert (ended.reason, ended.blocks) == ("cancelled", OURS)
    prefill.asked(wire.Close("t", taken=False))
    prefill.step("t", THEIRS[1:], 16)
    prefill.hold("t", THEIRS, 16)
    prefill.ended("t")
    assert decode.used().tolist() == [OURS[0]]
    assert len(decode.results) == 1


def test_cancelled_before_it_begins(stage: Stage) -> None:
    """A load that waits in the queue behind one that dials."""
    decode = stage.keep(Decode())
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = WorkerAddress(*silent.getsockname())
        peer = stage.keep(Peer(address, decode.own, decode.ended, load_s=60, prefill_s=60))
        peer.load(a_load("first"))
        accepted, _ = silent.accept()
        peer.cancel(peer.load(a_load("second")))
        accepted.close()
        again, _ = silent.accept()  # the transfer is given up
        again.close()
    ends = {end.request: end.reason for end in decode.wait(2)}
    assert (ends["first"], ends["second"]) == ("LinkError", "cancelled")


def test_a_transfer_that_is_given_up(stage: Stage) -> None:
    prefill, decode = stage.keep(Prefill()), stage.keep(Decode())
    prefill.hold("t", THEIRS, 16)
    stage.peer(prefill, decode).release("t")
    prefill.ended("t")
    assert decode.results == []


def test_a_revoked_transfer_fails_and_no_other(stage: Stage) -> None:
    prefill, decode = stage.keep(Prefill()), stage.keep(Decode())
    peer = stage.peer(prefill, decode)
    peer.load(a_load())
    peer.load(a_load("other", blocks=(10, 11, 12, 13)))
    prefill.asked(wire.Open, 2)
    prefill.step("t", THEIRS[:1], 4)
    prefill.step("other", (1,), 4)
    arrived(prefill, decode, (5, 1), (20, 10))
    prefill.asked(wire.Digest, 2)  # they were checked
    prefill.revoke("t")
    ended = decode.one()
    assert (ended.request, ended.reason, ended.blocks) == ("t", "TransferError", OURS)
    assert "does not hold the blocks any more" in str(ended.error)
    prefill.step("other", (3, 4, 6), 16)
    assert decode.wait(2)[1].error is None
    assert decode.has(prefill, (1, 3, 4, 6), (10, 11, 12, 13))


def test_blocks_lost_after_they_were_copied_are_not_used(stage: Stage) -> None:
    """Prefill gives them to another request before decode has said that it is done: who knows what was read."""
    prefill, decode = stage.keep(Prefill()), stage.keep(Decode())
    prefill.endpoint.before[wire.Close] = lambda: prefill.revoke("t")
    prefill.step("t", THEIRS, 16)
    stage.peer(prefill, decode).load(a_load())
    ended = decode.one()
    assert (ended.reason, ended.blocks, ended.copies) == ("TransferError", OURS, 1)
    assert "did not hold the blocks until they were read" in str(ended.error)


def test_blocks_lost_while_they_are_copied_are_not_used(stage: Stage) -> None:
    prefill, decode = stage.keep(Prefill()), stage.keep(Decode())
    prefill.endpoint.before[wire.Digest] = lambda: prefill.revoke("t")
    prefill.step("t", THEIRS, 16)
    stage.peer(prefill, decode).load(a_load())
    assert decode.one().reason == "TransferError"


def test_bytes_that_are_not_the_owner_s_are_not_used(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block is computed anew between the copy and the check; the next load is over a new link, checked again."""
    prefill, decode = stage.keep(Prefill()), stage.keep(Decode())
    prefill.step("t", THEIRS, 16)
    peer, choose, links = stage.peer(prefill, decode), LinkSelector.choose, []

    def counted(*arguments: Any) -> Chosen:
        links.append(choose(*arguments))
        return links[-1]

    monkeypatch.setattr(LinkSelector, "choose", counted)

    def scribble() -> None:
        eventually("the copy did not come", lambda: decode.has(prefill, THEIRS, OURS))
        prefill.wanted[1][THEIRS[2]] ^= 1
        prefill.step("t", THEIRS[2:3], 16)

    prefill.endpoint.before[wire.Digest] = scribble
    peer.load(a_load())
    ended = decode.one()
    assert ended.reason == "ChecksumError"
    del prefill.endpoint.before[wire.Digest]
    prefill.hold("u", THEIRS, 16)
    peer.load(a_load("u"))
    assert decode.wait(2)[1].error is None
    assert decode.has(prefill, THEIRS, OURS)
    assert len(links) == 2


@pytest.mark.parametrize("first", [True, False], ids=["computed before", "asked before"])
def test_another_prompt_is_not_taken(stage: Stage, first: bool) -> None:
    prefill, decode = stage.keep(Prefill()), stage.keep(Decode())
    peer = stage.peer(prefill, decode)
    if first:
        prefill.step("t", THEIRS, 16)
    peer.load(a_load(prompt=b"o" * 32))
    prefill.asked(wire.Open)
    if not first:
        prefill.step("t", THEIRS, 16)
    assert decode.one().reason == "TransferError"
    assert decode.used().tolist() == []


def test_an_owner_that_goes_away_ends_all_its_loads(stage: Stage) -> None:
    prefill, decode = stage.keep(Prefill("tcp")), stage.keep(Decode("tcp"))
    peer = stage.peer(prefill, decode)
    for index in range(3):
        peer.load(a_load(f"t{index}", blocks=tuple(range(4 * index, 4 * index + 4))))
    prefill.asked(wire.Open, 3)
    prefill.step("t0", THEIRS[:1], 4)
    arrived(prefill, decode, THEIRS[:1], (0,))
    prefill.asked(wire.Digest)
    prefill.endpoint.close()
    ends = decode.wait(3, seconds=2.0)
    assert {end.reason for end in ends} <= {"PeerGone", "TransferError"}  # as told by its connection or by the link
    assert all(end.error is not None for end in ends)
    assert sorted(end.request for end in ends) == ["t0", "t1", "t2"]


def test_an_owner_that_is_not_there(stage: Stage) -> None:
    prefill, decode = stage.keep(Prefill()), stage.keep(Decode())
    prefill.endpoint.close()
    peer = stage.peer(prefill, decode)
    for count in (1, 2):
        peer.load(a_load(f"t{count}"))
        assert decode.wait(count)[-1].reason == "PeerGone"


def test_an_owner_that_started_again_is_another_engine(stage: Stage) -> None:
    first, decode = Prefill("tcp"), stage.keep(Decode("tcp"))
    peer = stage.peer(first, decode)
    first.hold("t", THEIRS, 16)
    peer.load(a_load())
    assert decode.one().error is None
    first.close()
    second = stage.keep(Prefill("tcp", engine="second", seed=2, port=first.address.port))
    peer.load(a_load("u"))
    ended = decode.wait(2)[1]
    assert ended.reason == "PeerGone"
    assert f"is engine second now; the ticket is of {first.engine}" in str(ended.error)
    second.hold("v", THEIRS, 16)
    peer.load(a_load("v", engine="second"))
    assert decode.wait(3)[2].error is None
    assert decode.has(second, THEIRS, OURS)


def test_a_ticket_of_an_engine_that_has_gone_harms_no_other_load(stage: Stage) -> None:
    prefill, decode = stage.keep(Prefill()), stage.keep(Decode())
    peer = stage.peer(prefill, decode)
    peer.load(a_load())
    prefill.asked(wire.Open)
    peer.load(a_load("stale", engine="gone", blocks=(10, 11, 12, 13)))
    stale = decode.wait(1)[0]
    assert (stale.request, stale.reason) == ("stale", "PeerGone")
    prefill.step("t", THEIRS, 16)
    assert decode.wait(2)[1].error is None


def test_many_loads_from_one_owner(stage: Stage) -> None:
    """64 prompts of four blocks, each computed in four steps, in turn."""
    count = 64
    prefill, decode = stage.keep(Prefill(blocks=4 * count)), stage.keep(Decode(blocks=4 * count))
    peer = stage.peer(prefill, decode)
    names = [f"t{index}" for index in range(count)]
    ours = {name: tuple(range(4 * index, 4 * index + 4)) for index, name in enumerate(names)}
    theirs = {name: tuple(4 * count - 1 - block for block in ours[name]) for name in names}
    for name in names:
        peer.load(a_load(name, blocks=ours[name]))
    for step in range(4):
        for name in names:
            prefill.step(name, theirs[name][step : step + 1], (step + 1) * TOKENS)
        arrived(prefill, decode, theirs[names[0]][: step + 1], ours[names[0]][: step + 1])
    ends = decode.wait(count)
    assert [end.error for end in ends] == [None] * count
    assert sorted(end.request for end in ends) == sorted(names)
    for name in names:
        assert decode.has(prefill, theirs[name], ours[name])
        prefill.hold(name, theirs[name], 16)
    prefill.ended(*names)


def test_two_loads_of_one_transfer_both_end(stage: Stage) -> None:
    """A ticket is good for one use; the second may fail, but it must not take the first one's place."""
    prefill, decode = stage.keep(Prefill()), stage.keep(Decode())
    peer = stage.peer(prefill, decode)
    peer.load(a_load(request="first"))
    peer.load(a_load(request="second", blocks=(10, 11, 12, 13)))
    prefill.asked(wire.Open)
    prefill.step("t", THEIRS, 16)
    ends = {end.request: end for end in decode.wait(2)}
    assert sorted(ends) == ["first", "second"]
    assert ends["first"].error is None
    assert ends["second"].error is not None
    assert decode.has(prefill, THEIRS, OURS)


def test_two_readers_take_their_heads(stage: Stage) -> None:
    """Two workers of ours, two heads each, from one of theirs with four: its pin ends with the second one."""
    prefill = stage.keep(Prefill(block_bytes=64))
    ours, theirs = HeadLayout(4, 2, TOKENS, 4), HeadLayout(4, 1, TOKENS, 4)
    decodes = [stage.keep(Decode(block_bytes=32)) for _ in range(2)]
    for rank, decode in enumerate(decodes):
        [share] = shares(ours, rank, theirs)
        load = a_load(reader=rank, readers=2, cut=slices(ours, theirs, share))
        stage.peer(prefill, decode).load(load)
    prefill.asked(wire.Open, 2)
    prefill.step("t", THEIRS[:2], 8)
    prefill.step("t", THEIRS[2:], 16)
    prefill.hold("t", THEIRS, 16)
    for rank, decode in enumerate(decodes):
        assert decode.one().error is None
        for got, wanted in zip(decode.read_back(), prefill.wanted, strict=True):
            assert (got[list(OURS)] == wanted[list(THEIRS), 32 * rank : 32 * rank + 32]).all()
    prefill.ended("t")


def test_two_sides_that_keep_kv_differently(stage: Stage) -> None:
    prefill, decode = stage.keep(Prefill()), stage.keep(Decode(layout={"dtype": "fp8", "tensor_parallel": "2"}))
    peer = stage.peer(prefill, decode)
    for count in (1, 2):
        peer.load(a_load(f"t{count}"))
        ended = decode.wait(count)[-1]
        assert ended.reason == "LinkError"
        assert "dtype: 'fp8' here, 'bf16' there" in str(ended.error)
        assert "tensor_parallel" not in str(ended.error)


def test_an_error_of_ours_ends_what_it_concerns_once(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill, decode = stage.keep(Prefill()), stage.keep(Decode())
    peer = stage.peer(prefill, decode)

    def broken(*arguments: object) -> None:
        raise RuntimeError("broken")

    with monkeypatch.context() as patched:
        patched.setattr(LinkSelector, "choose", broken)
        peer.load(a_load())
        ended = decode.one()
    assert (ended.reason, ended.error) == ("Bug", "RuntimeError('broken')")
    prefill.hold("u", THEIRS, 16)
    peer.load(a_load("u"))
    assert decode.wait(2)[1].error is None, "the thread goes on"


def test_closing_ends_every_load(stage: Stage) -> None:
    prefill, decode = stage.keep(Prefill()), stage.keep(Decode())
    peer = stage.peer(prefill, decode)
    peer.load(a_load())
    prefill.asked(wire.Open)
    peer.close()
    assert decode.one().blocks == OURS
    prefill.hold("t", THEIRS, 16)
    prefill.ended("t")  # the connection is gone


def test_closing_ends_loads_that_have_not_begun(stage: Stage) -> None:
    decode = stage.keep(Decode())
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = WorkerAddress(*silent.getsockname())
        peer = stage.keep(Peer(address, decode.own, decode.ended, load_s=60, prefill_s=60))
        peer.load(a_load("first"))
        accepted, _ = silent.accept()  # it is busy dialling
        peer.load(a_load("second"))
        peer.load(a_load("third"))
        peer.close()
        accepted.close()
    assert sorted(end.request for end in decode.wait(3)) == ["first", "second", "third"]


def test_the_same_prompt_is_asked_for(stage: Stage) -> None:
    prefill, decode = stage.keep(Prefill()), stage.keep(Decode())
    prefill.hold("t", THEIRS, 16)
    stage.peer(prefill, decode).load(a_load(reader=1, readers=3))
    prefill.asked(wire.Open)
    [opened] = [q for q in prefill.endpoint.questions if isinstance(q, wire.Open)]
    assert (opened.transfer, opened.prompt, opened.reader, opened.readers) == ("t", PROMPT, 1, 3)
    assert decode.one().error is None
    prefill.asked(wire.Close("t", taken=True, reader=1))
