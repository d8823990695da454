"""Several threads at one copy: every part is done once, errors come out, nobody is left behind."""

from __future__ import annotations

import os
import threading

import pytest

from vllm_fleet.fabric.crew import Crew


def test_all_parts_are_done_once_by_several_threads() -> None:
    crew = Crew(3, "test-crew")
    parts, taking, done = iter(range(1000)), threading.Lock(), []
    meet = threading.Barrier(3, timeout=10)

    def work() -> None:
        meet.wait()  # all three are there
        while True:
            with taking:
                part = next(parts, None)
            if part is None:
                return
            done.append(part)

    crew.share(work)
    assert sorted(done) == list(range(1000))
    crew.close()
    crew.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("test-crew")]


@pytest.mark.parametrize("which", ["own", "helper"])
def test_an_error_of_any_thread_comes_out_when_all_have_ended(which: str) -> None:
    crew, me = Crew(2, "test-crew"), threading.get_ident()
    ended = threading.Event()

    def work() -> None:
        if (threading.get_ident() == me) == (which == "own"):
            raise ValueError("broken part")
        ended.set()

    with pytest.raises(ValueError, match="broken part"):
        crew.share(work)
    assert ended.is_set()
    crew.share(lambda: None)  # and it goes on working
    crew.close()


def test_a_second_caller_works_alone_meanwhile() -> None:
    crew = Crew(2, "test-crew")
    inside, release = threading.Event(), threading.Event()

    def slow() -> None:
        inside.set()
        assert release.wait(10)

    first = threading.Thread(target=crew.share, args=(slow,))
    first.start()
    assert inside.wait(10)
    runs: list[int] = []
    crew.share(lambda: runs.append(threading.get_ident()))
    assert runs == [threading.get_ident()]
    release.set()
    first.join(10)
    crew.close()
    crew.share(lambda: runs.append(0))  # closed: the caller alone
    assert runs[1:] == [0]


def test_one_thread_needs_no_helpers() -> None:
    before = threading.active_count()
    runs: list[int] = []
    Crew(1, "test-crew").share(lambda: runs.append(1))
    assert runs == [1]
    assert threading.active_count() == before


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_helpers_stay_off_the_callers_cpu() -> None:
    crew, me = Crew(2, "test-crew"), threading.get_ident()
    masks: list[set[int]] = []
    whole = os.sched_getaffinity(0)

    def work() -> None:
        if threading.get_ident() != me:
            masks.append(os.sched_getaffinity(0))

    crew.share(work)
    crew.close()
    assert len(masks) == 1
    assert len(masks[0]) == len(whole) - 1
    assert os.sched_getaffinity(0) == whole
