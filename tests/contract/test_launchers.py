"""One suite for whoever starts processes: beside the supervisor, and on a Ray cluster (a real one, started here)."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract.ray_cluster import RayCluster
from vllm_fleet.core.errors import ConfigError, FleetError
from vllm_fleet.launcher import logs, processes
from vllm_fleet.launcher.hosts import keeper, late
from vllm_fleet.launcher.hosts.contract import Handle, Launcher
from vllm_fleet.launcher.hosts.local import LocalLauncher
from vllm_fleet.launcher.hosts.placement import Ask
from vllm_fleet.launcher.hosts.ray import RayLauncher, connect
from vllm_fleet.launcher.processes import ProcessId
from vllm_fleet.launcher.spec import ProcessSpec
from vllm_fleet.net import sockets

pytestmark = pytest.mark.timeout(240)

MARK = "FLEET_LAUNCHER_TEST"
PATIENCE_S = 40.0
CLIENT_S = 80.0
TOKEN = "5ec2e7" * 11

SERVER = """
import http.server, json, os, signal, sys
host, port, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(dict(os.environ)).encode())
    def log_message(self, *args):
        pass
%s
print("hello from", port, flush=True)
http.server.HTTPServer((host, port), Handler).serve_forever()
"""
STUBBORN = """
import mmap, subprocess
signal.signal(signal.SIGTERM, lambda *_: print("not yet", flush=True))
name = f"/dev/shm/fleet-test-{os.getpid()}"
handle = os.open(name, os.O_RDWR | os.O_CREAT, 0o600)
os.ftruncate(handle, 4096)
kept = mmap.mmap(handle, 4096)
os.close(handle)
subprocess.Popen(["sleep", "1000"])
subprocess.Popen(["sleep", "1000"], start_new_session=True)
"""
DAEMON = """
away = "import subprocess; subprocess.Popen(['sleep', '1000'], start_new_session=True)"
subprocess.run([sys.executable, "-S", "-c", away])
"""


class Bench:
    """One launcher, and how to describe a process to it."""

    def __init__(self, launcher: Launcher, tmp: Path, *, remote: bool) -> None:
        self.launcher, self.tmp, self.remote = launcher, tmp, remote
        self.mark = secrets.token_hex(8)
        self.handles: list[Handle] = []

    def spec(self, script: str, name: str = "both-0", env: dict[str, str] | None = None) -> ProcessSpec:
        env = {MARK: self.mark, **(env or {})}
        if self.remote:
            argv = (late.PYTHON, "-S", "-c", script, late.HOST, late.PORT, late.FOLDER)
            return ProcessSpec(name, "instance", "both", argv, late.URL, env, needs={"CPU": 0.1})
        port = sockets.free_port("127.0.0.1")
        folder = self.tmp / f"{name}-{port}"
        folder.mkdir(mode=0o700)
        token = os.open(folder / "token", os.O_WRONLY | os.O_CREAT, 0o600)
        os.write(token, TOKEN.encode())
        os.close(token)
        argv = (sys.executable, "-S", "-c", script, "127.0.0.1", str(port), str(folder))
        return ProcessSpec(name, "instance", "both", argv, f"http://127.0.0.1:{port}", env, tmp=str(folder))

    def log(self, name: str = "both-0") -> Path:
        return self.tmp / f"{name}.log"

    def start(self, script: str, name: str = "both-0", env: dict[str, str] | None = None) -> Handle:
        self.handles.append(self.launcher.start(self.spec(script, name, env), self.log(name)))
        return self.handles[-1]

    def serve(self, extra: str = "", name: str = "both-0", env: dict[str, str] | None = None) -> Handle:
        """A server that answers."""
        handle = self.start(SERVER % extra, name, env)
        until(lambda: handle.poll() or answers(handle), self.log(name))
        assert not handle.poll(), (handle.reason, self.log(name).read_text())
        return handle

    def ended(self, handle: Handle) -> int:
        until(handle.poll, handle.reason)
        if handle in self.handles:
            self.handles.remove(handle)
        return handle.bury()

    def marked(self) -> dict[int, str]:
        """Every living process that this bench started, keepers not included."""
        found = {}
        for row in processes.table():
            try:
                environ = Path(f"/proc/{row.id.pid}/environ").read_bytes()
                words = Path(f"/proc/{row.id.pid}/cmdline").read_bytes()
            except OSError:
                continue
            if f"{MARK}={self.mark}".encode() in environ.split(b"\0") and not row.zombie:
                found[row.id.pid] = words.replace(b"\0", b" ").decode()
        return found

    def close(self) -> None:
        for handle in self.handles:
            handle.signal_group(signal.SIGKILL)
        while self.handles:
            self.ended(self.handles[0])
        for pid in self.marked():
            os.kill(pid, signal.SIGKILL)


def until(done: Callable[[], Any], what: object = "", patience_s: float = PATIENCE_S) -> None:
    end = time.monotonic() + patience_s
    while not done():
        if time.monotonic() > end:
            raise AssertionError(what.read_text() if isinstance(what, Path) and what.exists() else what)
        time.sleep(0.02)


def get(handle: Handle) -> dict[str, str]:
    assert handle.spec is not None
    with urllib.request.urlopen(handle.spec.health_url, timeout=5) as answer:
        told: dict[str, str] = json.loads(answer.read())
    return told


def answers(handle: Handle) -> bool:
    try:
        return handle.spec is not None and bool(get(handle))
    except OSError:
        return False


def identity(handle: Handle) -> ProcessId:
    """Of the process: all nodes are this machine here."""
    found = processes.identify(handle.pid)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'vllm-fleet[ray]'")
    started = RayCluster(cpus=4, gpus=2, client=True, in_process=True)
    yield started
    started.close()


@pytest.fixture(scope="module")
def ray_launcher(cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayLauncher]:
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text(TOKEN)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.settings.items():
            patch.setenv(name, value)
        launcher = RayLauncher(connect(cluster.address), token)
        yield launcher
        launcher.close()


@pytest.fixture(params=["local", "ray"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    if request.param == "local":
        made = Bench(LocalLauncher(dict(os.environ)), tmp_path, remote=False)
    else:
        made = Bench(request.getfixturevalue("ray_launcher"), tmp_path, remote=True)
    yield made
    made.close()


@pytest.fixture
def ray_bench(ray_launcher: RayLauncher, tmp_path: Path) -> Iterator[Bench]:
    made = Bench(ray_launcher, tmp_path, remote=True)
    yield made
    made.close()


def test_a_server_starts_answers_and_stops(bench: Bench) -> None:
    bench.log().write_text("from before\n")
    handle = bench.serve()
    assert handle.spec is not None
    port = int(handle.spec.url.rpartition(":")[2])
    assert str(port) in handle.spec.argv
    assert os.getsid(handle.pid) == handle.pid, "a session of its own"
    assert os.readlink(f"/proc/{handle.pid}/fd/0") == "/dev/null"
    assert bool(handle.node) == bench.remote
    assert (handle.id is None) == bench.remote, "a pid of another node must not be taken for one of ours"
    until(lambda: bench.log().read_text() == f"from before\nhello from {port}\n", bench.log())
    handle.signal_group(signal.SIGTERM)
    assert bench.ended(handle) == -signal.SIGTERM
    assert bench.marked() == {}
    with socket.socket() as probe:
        assert probe.connect_ex((handle.node or "127.0.0.1", port)) != 0


@pytest.mark.parametrize("code", [0, 1, 77])
def test_exit_code_and_last_words_arrive(bench: Bench, code: int) -> None:
    handle = bench.start(f"import sys; print('a word'); sys.stderr.write('the last\\n'); sys.exit({code})")
    assert bench.ended(handle) == code
    assert sorted(bench.log().read_text().splitlines()) == ["a word", "the last"]
    assert handle.reason == ""


def test_a_signal_from_elsewhere_is_told_apart_from_an_exit(bench: Bench) -> None:
    handle = bench.serve()
    os.kill(handle.pid, signal.SIGKILL)
    assert bench.ended(handle) == -signal.SIGKILL
    assert handle.reason == ""


def test_sigterm_then_sigkill_of_a_group_with_helpers(bench: Bench) -> None:
    handle = bench.serve(STUBBORN)
    name = f"/dev/shm/fleet-test-{handle.pid}"
    assert os.path.exists(name)
    assert len(bench.marked()) == 3, bench.marked()
    handle.remember(processes.table())
    handle.signal_group(signal.SIGTERM)
    until(lambda: "not yet" in bench.log().read_text(), bench.log())
    assert not handle.poll()
    handle.signal_group(signal.SIGKILL)
    assert bench.ended(handle) == -signal.SIGKILL
    assert bench.marked() == {}
    assert not os.path.exists(name)


def test_helpers_of_a_process_that_ends_by_itself_end_too(bench: Bench) -> None:
    handle = bench.start("import subprocess; subprocess.Popen(['sleep', '1000']); raise SystemExit(3)")
    assert bench.ended(handle) == 3
    assert bench.marked() == {}


def test_signals_may_come_twice_and_too_late(bench: Bench) -> None:
    handle = bench.serve()
    handle.signal_group(signal.SIGTERM)
    handle.signal_group(signal.SIGTERM)
    assert bench.ended(handle) == -signal.SIGTERM
    handle.signal_group(signal.SIGTERM)
    handle.signal_group(signal.SIGKILL)
    assert handle.poll()


def test_a_process_is_killed_before_it_is_known_to_run(bench: Bench) -> None:
    handle = bench.start(SERVER % "")
    handle.signal_group(signal.SIGKILL)
    assert bench.ended(handle) == -signal.SIGKILL
    until(lambda: bench.marked() == {}, "it runs")


def test_a_port_that_was_taken_is_told_by_the_log_and_another_is_found(bench: Bench) -> None:
    other = bench.serve(name="both-1")
    assert other.spec is not None
    taken = int(other.spec.url.rpartition(":")[2])
    handle = bench.start(SERVER % f"port = {taken}")
    assert bench.ended(handle) == 1
    assert logs.port_taken(logs.why(logs.tail(bench.log())))
    again = bench.serve()
    assert again.spec is not None
    assert again.spec.url != other.spec.url


def test_environment_and_secrets_reach_it_and_nobody_else(bench: Bench) -> None:
    tell = "folder = os.path.realpath(folder); token = folder + '/token'\n"
    tell += "os.environ['TOLD'] = json.dumps([open(token).read(), os.stat(token).st_mode & 0o777, "
    tell += "os.stat(folder).st_mode & 0o777, folder])"
    handle = bench.serve(tell, env={"GIVEN": "yes {braces}"})
    environ = get(handle)
    assert environ["GIVEN"] == "yes {braces}"
    token, file_mode, folder_mode, folder = json.loads(environ["TOLD"])
    assert (token, oct(file_mode), oct(folder_mode)) == (TOKEN, "0o600", "0o700")
    if bench.remote:
        assert not [name for name in environ if name.startswith("RAY_")], "Ray's own token is not for it"
    for row in processes.table():
        try:
            words = Path(f"/proc/{row.id.pid}/cmdline").read_bytes()
        except OSError:
            continue
        assert TOKEN.encode() not in words
    assert TOKEN not in bench.log().read_text()
    handle.signal_group(signal.SIGKILL)
    bench.ended(handle)
    assert not os.path.exists(folder)


def test_a_program_that_is_not_there(bench: Bench) -> None:
    spec = ProcessSpec("both-0", "instance", "both", ("/nowhere/python",), late.URL, needs={"CPU": 0.1})
    try:
        handle = bench.launcher.start(spec, bench.log())
    except FleetError as error:
        said = str(error)
    else:
        assert bench.ended(handle) != 0
        said = handle.reason
    assert "cannot start both-0" in said
    assert "No such file" in said


def test_much_output_arrives_whole_or_says_what_is_missing(bench: Bench) -> None:
    handle = bench.start("import sys\nfor at in range(40_000): print(f'{at:099d}')")
    assert bench.ended(handle) == 0
    text = bench.log().read_text()
    lost = [line for line in text.splitlines() if "bytes of output were lost here" in line]
    missing = sum(int(line.split("[vllm-fleet: ")[1].split(" ")[0]) for line in lost)
    assert len(text) + missing - sum(len(line[line.index("[vllm-fleet:") :]) + 1 for line in lost) == 40_000 * 100
    assert text.endswith(f"{39_999:099d}\n")


def test_twenty_starts_that_die_at_once_leave_nothing(bench: Bench) -> None:
    def folders() -> set[str]:
        return {name for name in os.listdir(tempfile.gettempdir()) if name.startswith(keeper.PREFIX)}

    before = folders()
    handles = [bench.start("raise SystemExit(9)", name=f"both-{at}") for at in range(20)]
    assert [bench.ended(handle) for handle in handles] == [9] * 20
    assert bench.marked() == {}
    until(lambda: folders() <= before, "folders are left")
    # What they held is free again: this one fits.
    assert get(bench.serve())[MARK] == bench.mark


# What only holds elsewhere than beside the supervisor -----------------------------------------------------------------


def parents(pid: int) -> Iterator[int]:
    row = processes.read(pid)
    while row is not None and row.parent > 1:
        yield row.parent
        row = processes.read(row.parent)


def keeper_of(handle: Handle) -> int:
    return next(parents(handle.pid))


def actor_of(handle: Handle) -> int:
    """The process that holds the other end of the keeper's standard input."""
    pipe = os.readlink(f"/proc/{keeper_of(handle)}/fd/0")
    for row in processes.table():
        folder = Path(f"/proc/{row.id.pid}/fd")
        try:
            held = {os.readlink(folder / name) for name in os.listdir(folder)}
        except OSError:
            continue
        if pipe in held and row.id.pid != keeper_of(handle):
            return row.id.pid
    raise AssertionError("no actor")


@pytest.mark.parametrize("victim", ["actor", "keeper", "actor and keeper"])
def test_a_process_does_not_outlive_its_actor(ray_bench: Bench, victim: str) -> None:
    handle = ray_bench.serve(STUBBORN)
    first = identity(handle)
    pids = {"actor": [actor_of(handle)], "keeper": [keeper_of(handle)]}
    time.sleep(1.5 * keeper.REMEMBER_EVERY_S)  # what it has had for so long is remembered on both sides
    for name in victim.split(" and "):
        os.kill(pids[name][0], signal.SIGKILL)
    until(lambda: not processes.alive(first), "it runs on")
    if victim != "actor and keeper":  # then nobody is left to find helpers that went away into sessions of their own
        until(lambda: ray_bench.marked() == {}, ray_bench.marked())
        until(lambda: not os.path.exists(f"/dev/shm/fleet-test-{handle.pid}"), "shared memory is left")
    code = ray_bench.ended(handle)
    assert code != 0
    if code > 0:
        assert "the Ray actor of both-0 on node" in handle.reason
    else:
        assert handle.reason == "its keeper was killed"


DRIVER = """
import os, ray, sys, time
from pathlib import Path
from vllm_fleet.launcher.hosts.ray import RayLauncher, connect
from vllm_fleet.launcher.spec import ProcessSpec
launcher = RayLauncher(connect(sys.argv[1]), Path(sys.argv[2]))
mark = {sys.argv[3]: sys.argv[4]}
spec = ProcessSpec("both-0", "instance", "both", ("sleep", "1000"), "", mark, needs={"CPU": 0.1})
handle = launcher.start(spec, Path(os.devnull))
while handle.spec is None:
    time.sleep(0.05)
print(handle.pid, flush=True)
sys.stdin.readline()
launcher.close()
print(handle.poll(), handle.bury(), ray.is_initialized(), flush=True)
"""


@pytest.mark.parametrize("way", ["node", "client", "closes"])
def test_a_process_does_not_outlive_its_driver(ray_bench: Bench, cluster: RayCluster, tmp_path: Path, way: str) -> None:
    """Killed on a node; killed elsewhere, where Ray waits 30 s for it to come back; or it leaves the cluster."""
    token = tmp_path / "token"
    token.write_text(TOKEN)
    address = cluster.client if way == "client" else cluster.address
    words = [sys.executable, "-c", DRIVER, address, str(token), MARK, ray_bench.mark]
    driver = subprocess.Popen(
        words, env=cluster.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert driver.stdin is not None
        assert driver.stdout is not None
        first = processes.identify(int(driver.stdout.readline()))
        assert first is not None
        if way == "closes":
            driver.stdin.write("\n")
            driver.stdin.flush()
            assert driver.stdout.readline() == "True -9 False\n"
        else:
            driver.kill()
            driver.wait()
        until(lambda: not processes.alive(first), "it outlived its driver", CLIENT_S if way == "client" else PATIENCE_S)
        until(lambda: ray_bench.marked() == {}, ray_bench.marked())
    finally:
        driver.kill()
        driver.communicate()


def test_no_helper_hides(bench: Bench) -> None:
    """One whose parent is dead and that has a session of its own."""
    handle = bench.serve(STUBBORN + DAEMON)
    assert len(bench.marked()) == 4, bench.marked()
    handle.signal_group(signal.SIGKILL)
    bench.ended(handle)
    assert bench.marked() == {}


def test_gpus_are_those_that_ray_gave(ray_bench: Bench, ray_launcher: RayLauncher) -> None:
    given = []
    for name in ("both-0", "both-1"):
        spec = ray_bench.spec(SERVER % "", name)
        needy = ProcessSpec(name, "instance", "both", spec.argv, spec.url, spec.env, needs={"CPU": 0.1, "GPU": 1.0})
        handle = ray_launcher.start(needy, ray_bench.log(name))
        ray_bench.handles.append(handle)
        until(lambda handle=handle: handle.poll() or answers(handle), ray_bench.log(name))  # type: ignore[misc]
        given.append(get(handle)["CUDA_VISIBLE_DEVICES"])
    assert sorted(given) == ["0", "1"]
    third = ray_launcher.start(
        ProcessSpec("both-2", "instance", "both", ("true",), "", needs={"GPU": 1.0}), ray_bench.log("both-2")
    )
    assert ray_bench.ended(third) != 0
    assert third.reason.startswith("the cluster has no room for both-2, which needs 1 GPUs on one node: ")


def test_too_much_is_refused_before_anything_starts(ray_launcher: RayLauncher) -> None:
    asks = [Ask(f"both-{at}", "both", {"CPU": 1.0, "GPU": 1.0}) for at in range(3)]
    with pytest.raises(FleetError, match=r"^the cluster has no room for 3 instances, 3 CPUs, 3 GPUs together: "):
        ray_launcher.plan(asks)


def test_no_cluster_there_is_one_sentence() -> None:
    port = sockets.free_port("127.0.0.1")
    with pytest.raises(ConfigError, match=rf"^cluster\.address: no Ray cluster answers at 127\.0\.0\.1:{port}: "):
        connect(f"127.0.0.1:{port}")


def test_a_folder_that_the_node_lacks_is_named(cluster: RayCluster, ray_launcher: RayLauncher, tmp_path: Path) -> None:
    spec = ProcessSpec("both-0", "instance", "both", ("true",), "", needs={"CPU": 0.1})
    demanding = RayLauncher(ray_launcher.cluster, ray_launcher.token_file, [str(tmp_path / "model")])
    handle = demanding.start(spec, tmp_path / "log")
    until(handle.poll)
    assert handle.bury() != 0
    assert f"there is no folder {tmp_path / 'model'} on node " in handle.reason
