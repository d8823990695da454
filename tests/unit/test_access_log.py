"""The access log: what is in a line, and that neither disk nor pipe makes anybody wait."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.unit.mock_instance import fleet, pair, streaming_pair, until
from vllm_fleet.config.keys import add_key
from vllm_fleet.core import limits
from vllm_fleet.core.env import RealEnv
from vllm_fleet.core.errors import ConfigError
from vllm_fleet.router.access_log import AccessLog, Line, utc
from vllm_fleet.router.drain import Drain
from vllm_fleet.router.front import Front
from vllm_fleet.router.observer import Observer, observer


def line(number: int = 0) -> Line:
    return Line(f"id-{number}", "/v1/completions", 200, 0.5)


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in file.read_text().splitlines()]


def eventually(done: Any, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.005)  # threads and files have no event to wait for


# The queue ---------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_dropped_and_counted_and_nobody_waits() -> None:
    written: list[int] = []
    busy, go = threading.Event(), threading.Event()

    def write(batch: list[int]) -> None:
        busy.set()
        assert go.wait(5)
        written.extend(batch)

    drain = Drain("test", write, 3, 0.0)
    drain.put(0)
    assert busy.wait(5)  # it hangs in its first write
    for number in range(1, 10):
        drain.put(number)
    assert (drain.dropped, drain.waiting) == (6, 3)
    go.set()
    assert drain.close(5)
    assert written == [0, 1, 2, 3]
    drain.put(11)
    assert (drain.dropped, written) == (7, [0, 1, 2, 3])


def test_closing_does_not_wait_for_ever() -> None:
    go = threading.Event()

    def write(batch: list[int]) -> None:
        go.wait(5)

    drain = Drain("test", write, 9, 0.0)
    drain.put(1)
    eventually(lambda: drain.waiting == 0)
    drain.put(2)
    assert not drain.close(0.01)
    assert drain.dropped == 1
    go.set()
    drain._thread.join(5)


# Lines -------------------------------------------------------------------------------------------------------------


def test_times_are_utc() -> None:
    assert utc(1_700_000_000.0625) == "2023-11-14T22:13:20.062Z"


def test_a_line_leaves_out_what_is_not_known(tmp_path: Path) -> None:
    log = AccessLog(str(tmp_path / "log"))
    log.put(line(), 0.0)
    log.close()
    assert read(tmp_path / "log") == [
        {"id": "id-0", "route": "/v1/completions", "status": 200, "seconds": 0.5, "time": "1970-01-01T00:00:00.000Z"}
    ]
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


def logging_to(file: Path, keys: Path | None = None) -> Front:
    from vllm_fleet.config.front_settings import FrontSettings
    from vllm_fleet.router.front import make_front

    settings = FrontSettings(access_log=str(file), keys_file=None if keys is None else str(keys))
    return make_front(settings, "f", bytes(32), RealEnv())


async def test_one_line_for_each_request_and_nothing_of_its_body(tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys", "alice")
    front, file = logging_to(tmp_path / "log", tmp_path / "keys"), tmp_path / "log"
    p, d = streaming_pair()
    async with fleet(p, d, front=front) as up:
        given = {"authorization": f"Bearer {key}"}
        body = {"prompt": "confidential", "user": "confidential"}
        await up.post(body, **{**given, "x-request-id": "first"})
        await up.post(b'{"prompt": "confidential"', **given)
        await up.post(body)
        await up.get("/v1/models/confidential")
        await up.get("/health")
        await until(lambda: up.router.exchange.live == 0)
    front.close()
    first, broken, nobody, unknown, health = read(file)
    assert "confidential" not in file.read_text()
    assert key[3:] not in file.read_text()
    assert first.pop("seconds") >= first.pop("first_byte_s") > 0
    assert first.pop("time").endswith("Z")
    assert first.pop("bytes_out") > 50
    assert first == {
        "id": "first", "route": "/v1/completions", "status": 200, "tenant": "alice", "prefill": "p", "decode": "d",
        "outcome": "handed_off", "mode": "streamed", "bytes_in": len(json.dumps(body)),
    }  # fmt: skip
    assert (broken["status"], broken["tenant"], broken["outcome"]) == (400, "alice", "not_sent")
    assert (nobody["status"], "tenant" in nobody, nobody["route"]) == (401, False, "/v1/completions")
    assert (unknown["status"], unknown["route"]) == (401, "other")
    assert (health["status"], health["route"]) == (200, "/health")


async def test_a_client_that_hangs_up_is_a_line_too(tmp_path: Path) -> None:
    front = logging_to(tmp_path / "log")
    p, d = pair()
    d.fault = "silent"
    async with fleet(p, d, front=front) as up:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await up.post({"prompt": "hi"})
        await until(lambda: up.router.exchange.live == 0)
    front.close()
    assert [(each["status"], each["decode"]) for each in read(tmp_path / "log")] == [(499, "d")]


async def test_retries_are_told(tmp_path: Path) -> None:
    front = logging_to(tmp_path / "log")
    p, d = pair()
    d.fault = "drop"
    async with fleet(p, d, front=front) as up:
        await up.post({"prompt": "hi"})
    front.close()
    assert [each.get("retries", 0) > 0 for each in read(tmp_path / "log")] == [True]


# Places ------------------------------------------------------------------------------------------------------------


def test_a_file_that_is_moved_away_or_cut_short(tmp_path: Path) -> None:
    file, moved = tmp_path / "log", tmp_path / "log.1"
    log = AccessLog(str(file))
    log.put(line(1), 0.0)
    eventually(lambda: file.stat().st_size > 0)
    file.rename(moved)
    log.put(line(2), 0.0)
    eventually(lambda: len(read(moved)) == 2)  # until it is told
    log.reopen()
    eventually(file.exists)
    log.put(line(3), 0.0)
    eventually(lambda: file.stat().st_size > 0)
    os.truncate(file, 0)  # copytruncate
    log.put(line(4), 0.0)
    log.close()
    assert [each["id"] for each in read(file)] == ["id-4"]
    assert log.dropped == 0


def test_a_full_disk_costs_lines_and_the_next_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, real = tmp_path / "log", os.write
    room = 150

    def write(handle: int, data: bytes) -> int:
        nonlocal room
        if threading.current_thread().name != "fleet-access-log":
            return real(handle, data)
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = bytes(data)[:room]
        room -= len(taken)
        return real(handle, taken)

    log = AccessLog(str(file))
    monkeypatch.setattr(os, "write", write)
    for number in range(3):
        log.put(line(number), 0.0)
    eventually(lambda: log.dropped == 2)  # the first one fitted
    room = 1000
    log.put(line(9), 0.0)
    log.close()
    whole = [json.loads(text)["id"] for text in file.read_text().splitlines() if text.endswith("}")]
    assert (whole, log.dropped) == (["id-0", "id-9"], 2)


def test_a_pipe_that_nobody_reads_costs_lines_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ACCESS_QUEUE_MAX", 100)
    monkeypatch.setattr(limits, "ACCESS_STOP_S", 0.05)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    log = AccessLog(str(pipe))  # returns, though opening a pipe waits for a reader
    log.put(line(0), 0.0)
    eventually(lambda: log._drain.waiting == 0)
    for number in range(150):
        log.put(line(number), 0.0)
    assert log.dropped == 50
    log.close()
    assert log.dropped == 150
    reader = os.open(pipe, os.O_RDONLY)  # let its thread go
    log._drain._thread.join(5)
    os.close(reader)


def test_a_file_that_cannot_be_written_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^router.access_log: cannot write .*/none/log: No such file"):
        AccessLog(str(tmp_path / "none" / "log"))


# Off ---------------------------------------------------------------------------------------------------------------


def test_what_is_off_is_not_there() -> None:
    off = observer("f", RealEnv(), None, None, 1.0)
    assert off.traced({"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}) is None
    assert off.losses() == {}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("fleet-access", "fleet-spans"))]
    assert isinstance(off, Observer)
