"""Groups over NCCL: two workers, each a process with a GPU of its own, and a real controller."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch with CUDA")
if torch.cuda.device_count() < 2:
    pytest.skip("needs two CUDA devices", allow_module_level=True)

from tests.contract.group_fleet import Controller, Worker, all_ask  # noqa: E402
from tests.contract.harness import eventually, state  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(180)]


class Pair:
    """Workers ``a`` on GPU 0 and ``b`` on GPU 1, in one group."""

    def __init__(self, controller: Controller, stack: ExitStack) -> None:
        self._controller, self._stack = controller, stack
        self.a, self.b = self.start("a", 0), self.start("b", 1)

    def start(self, name: str, device: int, group: str = "g") -> Worker:
        worker = Worker(self._controller.url, "nccl", device)
        worker.name = name
        self._stack.callback(worker.close)
        worker.until_ready()
        worker.ask("use", name=name, group=group, members=["a", "b"])
        return worker

    def form(self) -> Any:
        answers = all_ask([self.a, self.b], "form", group="g")
        assert [answer["members"] for answer in answers] == [["a", "b"]] * 2, answers
        assert answers[0]["id"] == answers[1]["id"]
        return answers[0]["epoch"]

    def works(self, group: str = "g") -> None:
        for root in (0, 1):
            for rank, worker in enumerate((self.a, self.b)):
                worker.tell("broadcast", group=group, root=root, value=10 + rank, nbytes=(64 << 20) + 3)
            assert [self.a.answer(), self.b.answer()] == [10 + root] * 2
        for giver, taker, rank in ((self.a, self.b, 0), (self.b, self.a, 1)):
            giver.tell("send", group=group, to=1 - rank, value=50 + rank)
            assert taker.ask("receive", group=group, source=rank) == 50 + rank
            assert giver.answer() is None


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controller]:
    made = Controller(tmp_path_factory.mktemp("controller"))
    yield made
    made.kill()


@pytest.fixture
def both(controller: Controller) -> Iterator[Pair]:
    with ExitStack() as stack:
        made = Pair(controller, stack)
        yield made
        for worker in (made.a, made.b):
            if worker.process.poll() is None:
                worker.ask("reset")


def test_form_and_form_again(both: Pair) -> None:
    epochs = []
    for _ in range(5):
        epochs.append(both.form())
        both.works()
        assert both.a.ask("receive", group="g", source=1, seconds=0.2).startswith("DeadlineExceeded")
        assert "a reports: nccl" in both.b.ask("wait", group="g")["reason"]
    assert epochs == sorted(set(epochs))


@pytest.mark.parametrize("in_call", [False, True])
def test_one_is_killed_and_a_fresh_process_takes_its_place(both: Pair, in_call: bool) -> None:
    both.form()
    both.works()
    both.a.tell("receive" if in_call else "wait", group="g", **({"source": 1} if in_call else {}))
    both.b.kill()
    answer = both.a.answer()
    assert (answer if in_call else answer["reason"]).find("epoch") >= 0
    both.b = both.start("b", 1)
    both.form()
    both.works()


@pytest.mark.parametrize("victim", ["a", "b"])
def test_one_dies_in_init(both: Pair, victim: str) -> None:
    """The one that made the id, or the other one; whoever is left gives up its communicator and waits for the next."""
    dies, lives = (both.a, both.b) if victim == "a" else (both.b, both.a)
    dies.tell("form", group="g", dies=True)
    lives.tell("form", group="g", seconds=60.0)
    assert dies.process.wait(20) == -signal.SIGKILL
    fresh = both.start(victim, 0 if victim == "a" else 1)
    if victim == "a":
        both.a = fresh
    else:
        both.b = fresh
    assert fresh.ask("form", group="g")["members"] == ["a", "b"]
    assert lives.answer()["members"] == ["a", "b"]
    both.works()


def test_one_hangs(both: Pair) -> None:
    both.form()
    both.works()
    both.b.signal(signal.SIGSTOP)
    eventually("it is not stopped", lambda: state(both.b.process.pid) == "T")
    answer = both.a.ask("receive", group="g", source=1, seconds=15.0)
    assert answer.startswith("EpochEnded"), answer
    assert "b does not answer" in answer
    both.b.signal(signal.SIGCONT)
    assert both.b.ask("wait", group="g")["reason"]
    both.form()
    both.works()


def test_nothing_is_left_behind(both: Pair) -> None:
    """After some repetitions: NCCL keeps some descriptors for the process."""

    def counts() -> tuple[int, int]:
        pid = both.a.process.pid
        return both.a.ask("threads")[0], len(list(Path(f"/proc/{pid}/fd").iterdir()))

    before = (0, 0)
    for turn in range(8):
        both.form()
        both.works()
        assert both.a.ask("receive", group="g", source=1, seconds=0.1).startswith("DeadlineExceeded")
        assert both.b.ask("wait", group="g")["reason"]
        if turn == 3:
            eventually("the threads do not settle", lambda: both.a.ask("threads")[0] <= 4, 10.0)
            before = counts()
    eventually("something is left", lambda: all(map(int.__le__, counts(), before)), 10.0, lambda: (counts(), before))
