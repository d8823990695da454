"""launcher.supervisor and launcher.down with real, tiny children."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.planners import StaticPlanner
from vllm_fleet.core.errors import Busy, FleetError
from vllm_fleet.launcher import processes
from vllm_fleet.launcher.down import down
from vllm_fleet.launcher.fleet import Rules
from vllm_fleet.launcher.processes import ProcessId
from vllm_fleet.launcher.record import FleetRecord, read_record
from vllm_fleet.launcher.rundir import RunDir
from vllm_fleet.launcher.spec import Kind, ProcessSpec
from vllm_fleet.launcher.status import status
from vllm_fleet.launcher.supervisor import Supervisor
from vllm_fleet.launcher.up import refuse_orphans
from vllm_fleet.launcher.view import Outcome
from vllm_fleet.net import sockets

SERVER = """
import http.server, os, signal, sys
port = int(sys.argv[1])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *args):
        pass
%s
print("hello from", port, flush=True)
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
STUBBORN = """
import mmap, multiprocessing, subprocess, socket
signal.signal(signal.SIGTERM, signal.SIG_IGN)
name = f"/dev/shm/fleet-test-{os.getpid()}"
handle = os.open(name, os.O_RDWR | os.O_CREAT, 0o600)
os.ftruncate(handle, 4096)
kept = mmap.mmap(handle, 4096)
os.close(handle)
bound = socket.socket(socket.AF_UNIX)
bound.bind(sys.argv[2] + "/own.sock")
helper = subprocess.Popen(["sleep", "1000"])
away = subprocess.Popen(["sleep", "1000"], start_new_session=True)
open(sys.argv[2] + "/made.txt", "w").write(f"{name} {helper.pid} {away.pid}")
"""
TAKEN = """
if not os.path.exists(sys.argv[2]):
    open(sys.argv[2], "w").close()
    raise OSError(98, "Address already in use")
"""


class Recorder:
    """A view that keeps everything."""

    def __init__(self) -> None:
        self.record: FleetRecord | None = None
        self.notes: list[str] = []
        self.lines: list[tuple[str, str]] = []
        self.is_ready = threading.Event()

    def show(self, record: FleetRecord) -> None:
        self.record = record

    def note(self, text: str) -> None:
        self.notes.append(text)

    def output(self, name: str, line: str) -> None:
        self.lines.append((name, line))

    def ready(self, record: FleetRecord) -> None:
        self.is_ready.set()


def spec(name: str, kind: Kind, port: int, extra: str = "", *args: str) -> ProcessSpec:
    argv = (sys.executable, "-S", "-c", SERVER % extra, str(port), *args)
    role = name.rpartition("-")[0] if kind == "instance" else kind
    return ProcessSpec(name, kind, role, argv, f"http://127.0.0.1:{port}")


class Running:
    """A supervisor in a thread of its own."""

    def __init__(self, run: RunDir, extras: Mapping[str, tuple[str, ...]], *, stop_s: float, ready_s: float) -> None:
        self.run, self.view = run, Recorder()
        kinds: dict[str, Kind] = {"controller": "controller", "router": "router", "both-0": "instance"}
        ports = {name: sockets.free_port("127.0.0.1") for name in kinds}

        def planner(chosen: Mapping[str, int]) -> tuple[ProcessSpec, ...]:
            return tuple(spec(name, kind, chosen[name], *extras.get(name, ())) for name, kind in kinds.items())

        rules = Rules(stop_s=stop_s, ready_s=ready_s, restarts_max=2)
        plans = StaticPlanner(planner, ports)
        self.supervisor = Supervisor(run, plans, frozenset(), rules, "m", dict(os.environ), self.view, verbose=True)
        self.outcome: Outcome | None = None
        self._thread = threading.Thread(target=self._main)
        self._thread.start()

    def _main(self) -> None:
        self.outcome = self.supervisor.run()

    def ready(self) -> FleetRecord:
        assert self.view.is_ready.wait(10.0), (self.outcome, self.view.lines)
        assert self.view.record is not None
        return self.view.record

    def wait(self, seconds: float = 12.0) -> Outcome:
        self._thread.join(seconds)
        assert self.outcome is not None
        return self.outcome

    def until(self, done: Callable[[FleetRecord], bool]) -> FleetRecord:
        for _ in range(200):
            if self.view.record is not None and done(self.view.record):
                return self.view.record
            time.sleep(0.05)
        raise AssertionError(self.view.record)

    def close(self) -> None:
        while self._thread.is_alive():
            self.supervisor.stop()
            self._thread.join(1.0)


Launch = Callable[..., Running]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    run = RunDir(tmp_path / "fleet")
    run.acquire()
    run.prepare([])
    started: list[Running] = []

    def start(*, stop_s: float = 5.0, ready_s: float = 15.0, **extras: tuple[str, ...]) -> Running:
        named = {name.replace("_", "-"): extra for name, extra in extras.items()}
        started.append(Running(run, named, stop_s=stop_s, ready_s=ready_s))
        return started[-1]

    yield start
    for each in started:
        each.close()
    run.release()


def pids(record: FleetRecord) -> dict[str, ProcessId]:
    return {each.name: each.id for each in record.processes if each.id is not None}


def states(record: FleetRecord) -> dict[str, str]:
    return {each.name: each.state for each in record.processes}


def test_a_fleet_starts_and_stops_and_nothing_is_left(launch: Launch) -> None:
    fleet = launch()
    record = fleet.ready()
    assert set(states(record).values()) == {"ready"}
    for process in pids(record).values():
        assert os.getsid(process.pid) == process.pid, "a session of its own"
        assert os.readlink(f"/proc/{process.pid}/fd/0") == "/dev/null"
    fleet.supervisor.stop()
    assert fleet.wait() == Outcome(0)
    assert not any(processes.alive(process) for process in pids(record).values())
    written = read_record(fleet.run)
    assert written is not None
    assert (written.phase, set(states(written).values())) == ("stopped", {"stopped"})
    names = {name for name, line in fleet.view.lines if line.startswith("hello from")}
    assert names == {"controller", "router", "both-0"}
    assert fleet.run.log_file("both-0").read_text().startswith("hello from")


def test_a_death_at_the_start_says_why(launch: Launch) -> None:
    fleet = launch(both_0=("print('noise\\n' * 50)\nraise ValueError('no such dtype')",))
    outcome = fleet.wait()
    assert outcome.code == 1
    assert outcome.reason == "both-0 ended with exit code 1: ValueError: no such dtype (while it was starting)"
    assert outcome.lines[-1] == "ValueError: no such dtype"
    assert len(outcome.lines) <= 3
    assert outcome.log == str(fleet.run.log_file("both-0"))
    assert fleet.view.record is not None
    assert not any(processes.alive(process) for process in pids(fleet.view.record).values())


def test_a_program_that_is_not_there_says_so(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    outcome = launch().wait()
    assert outcome.code == 1
    assert outcome.reason.startswith("controller could not be started: cannot start controller: [Errno 2]")


def test_silence_at_the_start_ends_it(launch: Launch) -> None:
    outcome = launch(router=("import time; time.sleep(1000)",), ready_s=1.5).wait()
    assert outcome.reason == "router did not answer GET /health with 200 within 1.5 s (setting: launcher.ready_s)"


def test_a_port_taken_in_between_is_replaced(launch: Launch, tmp_path: Path) -> None:
    fleet = launch(both_0=(TAKEN, str(tmp_path / "tried")))
    fleet.ready()
    assert fleet.view.notes == ["the port of both-0 was taken; another is tried"]


@pytest.mark.parametrize("name", ["both-0", "router", "controller"])
def test_what_dies_comes_back_where_it_was(launch: Launch, name: str) -> None:
    fleet = launch()
    before = fleet.ready()
    os.kill(pids(before)[name].pid, signal.SIGKILL)
    after = fleet.until(lambda record: pids(record)[name] != pids(before)[name] and states(record)[name] == "ready")
    assert [each.url for each in after.processes] == [each.url for each in before.processes]
    (note,) = fleet.view.notes
    assert note.startswith(f"{name} was ended by SIGKILL; it is started again in 0.")


DIES_LATER = """
import threading
if os.path.exists(sys.argv[2]):
    raise SystemExit("no more")
threading.Timer(1.0, lambda: (open(sys.argv[2], "w").close(), os._exit(1))).start()
"""


def test_an_instance_that_keeps_dying_is_given_up_and_the_others_stay(launch: Launch, tmp_path: Path) -> None:
    fleet = launch(both_0=(DIES_LATER, str(tmp_path / "died")))
    fleet.ready()
    after = fleet.until(lambda record: states(record)["both-0"] == "given_up")
    assert fleet.view.notes[-1].startswith("both-0 died 3 times within 600 s")
    assert fleet.view.notes[-1].endswith("start it again with: vllm-fleet restart both-0")
    assert (states(after)["router"], states(after)["controller"]) == ("ready", "ready")
    with sockets.listen("127.0.0.1", int(after.processes[2].url.rpartition(":")[2]), setting="test"):
        pass  # its port is free
    found = status(fleet.run)
    assert found.states["both-0"] == "given_up"
    assert found.to_json() == {
        "router": {"url": after.url("router"), "admin_url": after.admin_url()},
        "controller": {"url": after.url("controller")},
        "instances": [
            {
                "name": "both-0",
                "role": "both",
                "url": after.processes[2].url,
                "pid": pids(after)["both-0"].pid,
                "state": "given_up",
                "note": found.record.processes[2].note,
                "computes_below_tokens": {},
            }
        ],
        "desired": {"prefill": 0, "decode": 0, "both": 1},
    }
    assert len(found.remarks) == 1
    assert found.remarks[0].startswith("the controller does not answer (")


def test_a_child_that_ignores_sigterm_is_killed_with_all_it_made(launch: Launch, tmp_path: Path) -> None:
    fleet = launch(both_0=(STUBBORN, str(tmp_path)), stop_s=1.0)
    record = fleet.ready()
    name, *helpers = (tmp_path / "made.txt").read_text().split()
    watched = [processes.identify(int(pid)) for pid in helpers]
    assert all(watched)
    assert os.path.exists(name)
    began = time.monotonic()
    fleet.supervisor.stop()
    assert fleet.wait() == Outcome(0)
    assert time.monotonic() - began < 4.0
    for process in (*watched, *pids(record).values()):
        assert process is not None
        assert not processes.alive(process)
    assert not os.path.exists(name)
    assert not (tmp_path / "own.sock").exists()
    assert (tmp_path / "made.txt").exists(), "a plain file is nobody's leftover"


def test_a_file_that_took_a_leftovers_place_stays(launch: Launch, tmp_path: Path) -> None:
    fleet = launch(both_0=(STUBBORN, str(tmp_path)), stop_s=0.5)
    fleet.ready()
    fleet.until(lambda record: any(each.leftovers for each in record.processes))
    name = (tmp_path / "made.txt").read_text().split()[0]
    keep = os.open(name, os.O_RDONLY)  # keeps the inode from being used again
    os.unlink(name)
    Path(name).write_text("somebody else's")
    try:
        fleet.supervisor.stop()
        fleet.wait()
        assert Path(name).read_text() == "somebody else's"
    finally:
        os.close(keep)
        os.unlink(name)


def test_a_second_request_does_not_wait(launch: Launch, tmp_path: Path) -> None:
    fleet = launch(both_0=(STUBBORN, str(tmp_path)), stop_s=60.0)
    fleet.ready()
    began = time.monotonic()
    fleet.supervisor.stop()
    fleet.supervisor.stop()
    fleet.wait()
    assert time.monotonic() - began < 4.0
    assert not os.path.exists((tmp_path / "made.txt").read_text().split()[0])


def test_a_second_up_is_refused(launch: Launch) -> None:
    fleet = launch()
    with pytest.raises(Busy, match=f"runs already: pid {os.getpid()}, run folder {fleet.run.folder}"):
        RunDir(fleet.run.folder).acquire()


KILLED = """
import json, os, sys
from tests.planners import StaticPlanner
from vllm_fleet.launcher.fleet import Rules
from vllm_fleet.launcher.__main__ import Silent
from vllm_fleet.launcher.rundir import RunDir
from vllm_fleet.launcher.spec import ProcessSpec
from vllm_fleet.launcher.supervisor import Supervisor
from pathlib import Path
folder, specs = sys.argv[1], json.loads(sys.argv[2])
run = RunDir(Path(folder))
run.acquire()
run.prepare([])
planner = StaticPlanner(lambda ports: tuple(ProcessSpec(**one) for one in specs), {})
out = Supervisor(run, planner, frozenset(), Rules(stop_s=2.0, drain_s=1.0), "m", dict(os.environ), Silent()).run()
sys.exit(out.code)
"""


@pytest.fixture
def background(tmp_path: Path) -> Iterator[tuple[RunDir, subprocess.Popen[bytes]]]:
    specs = [
        spec("controller", "controller", sockets.free_port("127.0.0.1")),
        spec("router", "router", sockets.free_port("127.0.0.1")),
        spec("both-0", "instance", sockets.free_port("127.0.0.1"), STUBBORN, str(tmp_path)),
    ]
    plain = [
        {"name": s.name, "kind": s.kind, "role": s.role, "argv": s.argv, "url": s.url, "env": dict(s.env)}
        for s in specs
    ]
    run = RunDir(tmp_path / "fleet")
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(run.folder), json.dumps(plain)])
    try:
        for _ in range(200):
            record = read_record(run)
            if record is not None and record.phase == "serving" and any(each.leftovers for each in record.processes):
                break
            time.sleep(0.05)
        else:
            raise AssertionError(record)
        yield run, process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        record = read_record(run)
        if record is not None:
            processes.kill(record.living(), 2.0)


def test_down_stops_a_fleet(background: tuple[RunDir, subprocess.Popen[bytes]], tmp_path: Path) -> None:
    run, process = background
    record = read_record(run)
    assert record is not None
    reaper = threading.Thread(target=process.wait)
    reaper.start()
    shown: list[dict[str, str]] = []
    said = down(run, None, lambda now: shown.append({each.name: each.state for each in now.processes}))
    assert said == "fleet 'fleet' is down"
    first = next(at for at, states in enumerate(shown) if "stopped" in states.values())
    assert all("stopped" in states.values() for states in shown[first:]), "what has stopped is not told to be ready"
    reaper.join()
    assert process.returncode == 0
    assert record.living() == set()
    assert not os.path.exists((tmp_path / "made.txt").read_text().split()[0])


def test_down_cleans_up_after_a_supervisor_that_was_killed(
    background: tuple[RunDir, subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    run, process = background
    record = read_record(run)
    assert record is not None
    process.kill()
    process.wait()
    assert len(record.living()) == 5, "they go on serving without it"
    with pytest.raises(Busy, match=r"was killed but 5 of its processes still run; stop them first: vllm-fleet down"):
        refuse_orphans(run)
    found = status(run)
    assert found.remarks[0].startswith("the supervisor of fleet 'fleet' was killed")
    assert set(found.states.values()) == {"ready"}
    assert down(run) == "the supervisor of fleet 'fleet' had been killed; 5 processes it left were stopped"
    assert record.living() == set()
    assert not os.path.exists((tmp_path / "made.txt").read_text().split()[0])
    assert not (tmp_path / "own.sock").exists()
    with pytest.raises(FleetError, match=r"^no fleet named 'fleet' runs "):
        down(run)
    with pytest.raises(FleetError, match=r"^no fleet named 'fleet' runs "):
        status(run)
