"""Fixtures of the conformance suite: the transport under test, its kept peer, and a check that nothing is left."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.contract.cases import CASES, Case
from tests.contract.harness import Bench, Peers, counts, eventually, files


@pytest.fixture(scope="session")
def peers() -> Iterator[Peers]:
    kept = Peers()
    yield kept
    kept.close()


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    found = CASES[request.param]
    reason = found.missing()
    if reason is not None:
        pytest.skip(reason)
    return found


@pytest.fixture
def bench(case: Case, peers: Peers) -> Iterator[Bench]:
    """Both sides; afterwards neither this process nor the kept peer has more threads or file descriptors."""
    device = case.device(peer=False)
    if device is not None:
        importlib.import_module("tests.contract.cuda_pool").settle(device)
    peer = peers.get(case)
    theirs = peer.ask("counts")
    before, open_before, open_there = counts(), files(), files(peer.pid)
    with ExitStack() as stack:
        yield Bench(case, peer, stack)
    eventually("a thread was left behind", lambda: counts()[0] <= before[0], details=threading.enumerate)
    eventually(
        "a file descriptor was left behind",
        lambda: counts()[1] <= before[1],
        details=lambda: sorted(files().items() - open_before.items()),
    )
    if peer.alive():
        peer.ask("free")
        eventually(
            "the peer kept a thread or a descriptor",
            lambda: all(map(int.__le__, peer.ask("counts"), theirs)),
            details=lambda: (theirs, peer.ask("counts"), sorted(files(peer.pid).items() - open_there.items())),
        )
