"""launcher.rundir and launcher.record."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_fleet.config.connector import read_token
from vllm_fleet.core import limits
from vllm_fleet.core.errors import Busy, ConfigError, Corrupt, FleetError
from vllm_fleet.launcher import processes
from vllm_fleet.launcher.leftovers import Leftover
from vllm_fleet.launcher.processes import ProcessId
from vllm_fleet.launcher.record import FleetRecord, ProcessRecord, read_record, write_record
from vllm_fleet.launcher.rundir import RunDir, home
from vllm_fleet.launcher.up import run_folder


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_where_run_folders_are() -> None:
    assert home({"VLLM_FLEET_HOME": "/a", "XDG_STATE_HOME": "/b", "HOME": "/c"}) == Path("/a")
    assert home({"XDG_STATE_HOME": "/b", "HOME": "/c"}) == Path("/b/vllm-fleet")
    assert home({"XDG_STATE_HOME": "relative", "HOME": "/c"}) == Path("/c/.local/state/vllm-fleet")
    assert run_folder("x", {"VLLM_FLEET_HOME": "/a"}).folder == Path("/a/x")
    for name in ("../x", "", "Big", "a" * 65):
        with pytest.raises(ConfigError, match="is no fleet's name"):
            run_folder(name, {"VLLM_FLEET_HOME": "/a"})


def test_token_and_folders_are_the_owners_only(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "deep" / "fleet")
    run.acquire()
    run.prepare(["prefill-0"])
    run.write_settings(str(run.settings_folder / "router.json"), {"port": 1})
    assert mode(run.folder) == 0o700
    assert mode(run.token_file) == 0o600
    assert mode(run.settings_folder / "router.json") == 0o600
    assert re.fullmatch("[0-9a-f]{64}", run.token_file.read_text())
    first = read_token(run.token_file)
    run.prepare(["prefill-0"])
    assert read_token(run.token_file) != first, "each run has a token of its own"
    assert not (run.settings_folder / "router.json").exists()
    run.clear()
    assert sorted(path.name for path in run.folder.iterdir()) == ["lock", "logs"]
    run.release()


def test_a_second_owner_is_refused_with_pid_and_path(tmp_path: Path) -> None:
    first, second = RunDir(tmp_path / "f"), RunDir(tmp_path / "f")
    assert not second.held()
    first.acquire()
    assert second.held()
    with pytest.raises(Busy) as caught:
        second.acquire()
    assert str(caught.value) == (
        f"a fleet named 'f' runs already: pid {os.getpid()}, run folder {tmp_path / 'f'}; "
        "stop it with: vllm-fleet down --name f"
    )
    first.release()
    first.release()
    assert not second.held()
    second.acquire()
    second.release()


def test_the_lock_ends_with_its_process_and_is_not_inherited(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "f")
    run.acquire()
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as child:
        run.release()
        assert not RunDir(tmp_path / "f").held()
        assert child.stdin is not None
        child.stdin.close()


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FleetError, match=r"^cannot make the run folder .*/file/f: Not a directory$"):
        RunDir(tmp_path / "file" / "f").acquire()


def test_temporary_folders_leave_room_for_a_socket_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path / "f")
    run.acquire()
    monkeypatch.setattr(limits, "SOCKET_PATH_LEN_MAX", len(str(run.tmp_folder / "both-0")) + 37)
    inside = Path(run.prepare(["both-0"])["both-0"])
    assert inside == run.tmp_folder / "both-0"
    monkeypatch.setattr(limits, "SOCKET_PATH_LEN_MAX", len(str(inside)) + 36)
    outside = Path(run.prepare(["both-0"])["both-0"])
    assert run.folder not in outside.parents
    assert mode(inside.parent) == mode(outside) == 0o700
    outside.rmdir()
    run.release()


def test_logs_are_rotated_once(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "f")
    run.acquire()
    run.rotate_log("x")
    for text in ("1", "2", "3"):
        run.log_file("x").write_text(text)
        run.rotate_log("x")
    assert [file.name for file in run.logs_folder.iterdir()] == ["x.log.1"]
    assert (run.logs_folder / "x.log.1").read_text() == "3"
    run.release()


def test_records_come_back_as_written(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "f")
    assert read_record(run) is None
    run.acquire()
    me = processes.identify(os.getpid())
    assert me is not None
    dead = ProcessId(me.pid, me.start + 1)
    each = ProcessRecord(
        "prefill-0", "instance", "prefill", "http://127.0.0.1:1", "ready", 1.5, "/log", me, (me, dead),
        (Leftover("/dev/shm/x", 1, 2),), "/tmp/x",
    )  # fmt: skip
    router = ProcessRecord("router", "router", "router", "http://127.0.0.1:2", "waiting", 1.5, "/log")
    record = FleetRecord("f", "m", processes.boot_id(), me, "serving", 8.0, (router, each), "why", ("line",))
    write_record(run, record)
    assert read_record(run) == record
    assert mode(run.record_file) == 0o600
    assert record.url("router") == "http://127.0.0.1:2"
    assert record.supervised()
    assert record.living() == {me}
    other_boot = FleetRecord("f", "m", "another boot", me, "serving", 8.0, (router, each))
    assert not other_boot.supervised()
    assert other_boot.living() == set()
    run.record_file.write_text("{")
    with pytest.raises(Corrupt, match=r"fleet.json is damaged or of another version"):
        read_record(run)
    run.release()
