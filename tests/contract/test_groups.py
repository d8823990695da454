"""Groups of workers over gloo, with a real controller: every worker and the controller is a process of its own."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract.group_fleet import Controller, Worker, Workers, all_ask
from tests.contract.harness import eventually, state

pytest.importorskip("torch")
pytestmark = pytest.mark.timeout(180)

Start = Callable[[str], list[Worker]]


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controller]:
    made = Controller(tmp_path_factory.mktemp("controller"))
    yield made
    made.kill()


@pytest.fixture(scope="module")
def workers(controller: Controller) -> Iterator[Workers]:
    made = Workers(controller.url)
    yield made
    made.close()


@pytest.fixture
def start(workers: Workers) -> Iterator[Start]:
    """Workers by name."""
    yield workers.take
    workers.give_back()


def use(workers: list[Worker], group: str, members: str, **more: Any) -> None:
    for worker in workers:
        assert "Error" not in worker.ask("use", name=worker.name, group=group, members=list(members), **more)


def formed(workers: list[Worker], group: str = "g") -> list[Any]:
    """Let all form; they must agree on everything."""
    answers = all_ask(workers, "form", group=group)
    assert all(isinstance(answer, dict) for answer in answers), answers
    assert [answer["members"] for answer in answers] == [sorted(one.name for one in workers)] * len(workers)
    assert sorted(answer["rank"] for answer in answers) == list(range(len(workers)))
    assert len({answer["epoch"] for answer in answers}) == len({answer["id"] for answer in answers}) == 1
    return answers


def works(workers: list[Worker], group: str = "g") -> None:
    """Broadcasts from each rank arrive everywhere, and what one sends the next receives."""
    for root in range(len(workers)):
        for rank, worker in enumerate(workers):
            worker.tell("broadcast", group=group, root=root, value=10 + rank, nbytes=(1 << 20) + 3)
        assert [worker.answer() for worker in workers] == [10 + root] * len(workers)
    for rank, worker in enumerate(workers):
        after = workers[(rank + 1) % len(workers)]
        worker.tell("send", group=group, to=(rank + 1) % len(workers), value=77 + rank)
        assert after.ask("receive", group=group, source=rank) == 77 + rank
        assert worker.answer() is None


def test_a_pair(start: Start) -> None:
    pair = start("ab")
    use(pair, "pair", "ab")
    formed(pair, "pair")
    works(pair, "pair")
    assert pair[0].ask("close", group="pair") is None
    assert "a left" in pair[1].ask("wait", group="pair")["reason"]
    assert pair[1].ask("close", group="pair") is None


def test_a_member_dies_in_a_broadcast_and_comes_back(start: Start) -> None:
    a, b, c = start("abc")
    use([a, b, c], "g", "abc")
    first = formed([a, b, c])[0]["epoch"]
    works([a, b, c])
    for worker in (a, b, c):
        worker.tell("broadcasts", group="g", times=100_000, nbytes=4 << 20)
    assert [worker.note() for worker in (a, b, c)] == ["busy"] * 3
    c.kill()
    assert [worker.answer().split(":")[0] for worker in (a, b)] == ["EpochEnded"] * 2
    second = formed([a, b])
    assert second[0]["epoch"] > first
    works([a, b])
    assert a.ask("stands", group="g")
    (c,) = start("c")
    use([c], "g", "abc")
    c.tell("form", group="g")
    assert "c joins" in a.ask("wait", group="g")["reason"]
    for worker in (a, b):
        worker.tell("form", group="g")
    assert [worker.answer()["members"] for worker in (a, b, c)] == [["a", "b", "c"]] * 3
    works([a, b, c])


def test_rank_0_dies(start: Start) -> None:
    """Whoever made the id, and serves what comes with it."""
    a, b, c = start("abc")
    use([a, b, c], "g", "abc")
    formed([a, b, c])
    a.kill()
    for worker in (b, c):
        worker.tell("wait", group="g")
    assert all("a does not answer" in worker.answer()["reason"] for worker in (b, c))
    formed([b, c])
    works([b, c])


def test_the_controller_is_killed_meanwhile(start: Start, controller: Controller) -> None:
    a, b, c = start("abc")
    use([a, b, c], "g", "abc")
    first = formed([a, b, c])[0]["epoch"]
    controller.kill()
    works([a, b, c])
    assert all_ask([a, b, c], "stands", group="g") == [True] * 3
    controller.start()
    eventually("the epoch is not taken over", lambda: a.ask("status", group="g") == "formed", 20.0)
    works([a, b, c])
    controller.kill()
    c.kill()
    for worker in (a, b):
        worker.tell("broadcast", group="g", root=2, value=0)
    assert [worker.answer().split(":")[0] for worker in (a, b)] == ["EpochEnded"] * 2
    for worker in (a, b):
        worker.tell("form", group="g", seconds=40.0)
    controller.start()
    answers = [worker.answer() for worker in (a, b)]
    assert [answer["members"] for answer in answers] == [["a", "b"]] * 2
    assert answers[0]["epoch"] > first
    works([a, b])


def test_a_member_is_missing(start: Start) -> None:
    a, b = start("ab")
    use([a, b], "strict", "abc", least=3)
    answers = all_ask([a, b], "form", group="strict", seconds=2.0)
    assert all("DeadlineExceeded: c did not finish meeting for group strict" in answer for answer in answers)
    use([a, b], "g", "abc", least=2, gather_s=0.5)
    formed([a, b])
    works([a, b])


@pytest.mark.parametrize("victim", ["a", "b"])
def test_a_member_dies_in_init(start: Start, victim: str) -> None:
    """When it has the id, or made it, and the others are joining."""
    workers = start("abc")
    use(workers, "g", "abc")
    rest = [worker for worker in workers if worker.name != victim]
    for worker in workers:
        worker.tell("form", group="g", dies=worker.name == victim)
    answers = [worker.answer() for worker in rest]
    assert [answer["members"] for answer in answers] == [[one.name for one in rest]] * 2
    assert next(worker for worker in workers if worker.name == victim).process.wait(10) == -signal.SIGKILL
    works(rest)


def test_a_member_that_hangs_costs_its_lease(start: Start) -> None:
    """Stopped, so that neither a connection breaks nor a word comes; gloo's calls must be left alone then."""
    a, b, c = start("abc")
    use([a, b, c], "g", "abc")
    formed([a, b, c])
    c.signal(signal.SIGSTOP)
    eventually("it is not stopped", lambda: state(c.process.pid) == "T")
    answers = all_ask([a, b], "receive", group="g", source=2, seconds=12.0)
    assert all(answer.startswith("EpochEnded") and "c does not answer" in answer for answer in answers), answers
    formed([a, b])
    works([a, b])
    eventually("a thread is left in gloo", lambda: a.ask("threads")[1] == 1, 20.0)
    c.signal(signal.SIGCONT)
    c.tell("receive", group="g", source=0)
    assert c.answer().startswith("EpochEnded")


def test_a_deadline_ends_the_epoch_and_blames_whom_it_waited_for(start: Start) -> None:
    a, b = start("ab")
    use([a, b], "g", "ab")
    formed([a, b])
    assert a.ask("receive", group="g", source=1, seconds=0.5).startswith("DeadlineExceeded")
    assert "a reports: gloo" in b.ask("wait", group="g")["reason"]
    formed([a, b])
    works([a, b])


def test_two_groups_at_once_do_not_disturb_each_other(start: Start) -> None:
    a, b, c = start("abc")
    use([a, b], "one", "ab")
    use([a, b, c], "two", "abc")
    formed([a, b], "one")
    formed([a, b, c], "two")
    works([a, b], "one")
    works([a, b, c], "two")
    c.kill()
    assert "EpochEnded" in a.ask("receive", group="two", source=2)
    assert a.ask("stands", group="one")
    works([a, b], "one")
    formed([a, b], "two")
    works([a, b], "two")


def test_nothing_is_left_behind(start: Start) -> None:
    a, b = start("ab")
    use([a, b], "g", "ab")
    formed([a, b])
    works([a, b])
    all_ask([a, b], "close", group="g")
    threads, files = a.ask("threads"), len(list(Path(f"/proc/{a.process.pid}/fd").iterdir()))
    for _ in range(5):
        use([a, b], "g", "ab")
        formed([a, b])
        works([a, b])
        all_ask([a, b], "close", group="g")
    eventually("a thread is left", lambda: a.ask("threads") <= threads, 10.0, lambda: (a.ask("threads"), threads))
    eventually(
        "a file descriptor is left", lambda: len(list(Path(f"/proc/{a.process.pid}/fd").iterdir())) <= files, 10.0
    )
