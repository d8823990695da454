"""Watchers: what waits, what is cut off, when they are told that the stream lives."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from vllm_fleet.controller.watchers import Watcher, Watchers
from vllm_fleet.core import limits
from vllm_fleet.core.errors import Busy
from vllm_fleet.wire.control import Change, Member, decode_watch_event


@dataclass
class FakeOutlet:
    """Takes ``room`` lines before it says that its peer is behind."""

    room: int = 100
    written: list[bytes] = field(default_factory=list)
    ended: bool = False
    was_cut: bool = False

    def write(self, part: bytes) -> bool:
        assert not self.ended
        self.written.append(part)
        return len(self.written) < self.room

    def end(self) -> None:
        self.ended = True

    def cut(self) -> None:
        self.was_cut = True


def opened(watchers: Watchers, room: int = 100) -> tuple[Watcher, FakeOutlet]:
    watcher, outlet = watchers.add(b"first\n"), FakeOutlet(room)
    watcher.on_open(outlet)
    return watcher, outlet


def change(revision: int) -> Change:
    return Change(revision, Member("a", "both", "http://h:1", 1, "life", 1, "ready"))


def revisions(outlet: FakeOutlet) -> list[int]:
    return [decode_watch_event(line).revision for line in outlet.written if line != b"first\n"]


def test_everybody_is_told_in_order() -> None:
    watchers = Watchers()
    both = [opened(watchers)[1] for _ in range(2)]
    for revision in (1, 2, 3):
        watchers.publish(change(revision))
    assert [revisions(outlet) for outlet in both] == [[1, 2, 3], [1, 2, 3]]
    assert all(outlet.written[0] == b"first\n" for outlet in both)


def test_what_is_published_before_the_head_is_sent_comes_after_the_first_lines() -> None:
    watchers = Watchers()
    watcher, outlet = watchers.add(b"first\n"), FakeOutlet()
    watchers.publish(change(1))
    watcher.on_open(outlet)
    assert (outlet.written[0], revisions(outlet)) == (b"first\n", [1])


def test_lines_wait_for_a_peer_that_is_behind() -> None:
    watchers = Watchers()
    watcher, outlet = opened(watchers, room=2)
    for revision in (1, 2, 3):
        watchers.publish(change(revision))
    assert revisions(outlet) == [1]
    outlet.room = 100
    watcher.on_room()
    assert revisions(outlet) == [1, 2, 3]


def test_who_falls_too_far_behind_is_cut_off_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "WATCH_QUEUE_MAX", 2)
    watchers = Watchers()
    slow, good = opened(watchers, room=1)[1], opened(watchers)[1]
    for revision in (1, 2, 3, 4):
        watchers.publish(change(revision))
    assert (slow.was_cut, good.was_cut, revisions(good), len(watchers)) == (True, False, [1, 2, 3, 4], 1)


def test_who_hears_nothing_is_told_that_the_stream_lives() -> None:
    watchers = Watchers()
    _, outlet = opened(watchers)
    times = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25]
    said = []
    for now in times:
        watchers.reassure(7, now, 0.5)
        said.append(len(revisions(outlet)))
    assert said == [0, 0, 1, 1, 1, 2], "at most STILL_HERE_S apart, noticed late included"


def test_ending_sends_what_waits_first() -> None:
    watchers = Watchers()
    watcher, outlet = opened(watchers, room=2)
    watchers.publish(change(1))
    watchers.publish(change(2))
    watchers.end()
    assert not outlet.ended
    outlet.room = 100
    watcher.on_room()
    assert (revisions(outlet), outlet.ended) == ([1, 2], True)
    with pytest.raises(Busy, match="stopping"):
        watchers.add(b"")


def test_who_left_is_forgotten() -> None:
    watchers = Watchers()
    watcher, outlet = opened(watchers)
    watcher.on_closed()
    watchers.publish(change(1))
    assert (len(watchers), outlet.written) == (0, [b"first\n"])
