"""The command line: light imports, exit codes, one sentence per failure."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.planners import Make, StaticPlanner
from vllm_fleet.cli import flags, main
from vllm_fleet.cli import up as up_command
from vllm_fleet.cli.progress import Live, Plain, table
from vllm_fleet.config.fleet import FleetConfig
from vllm_fleet.core.errors import ConfigError
from vllm_fleet.launcher import up as up_module
from vllm_fleet.launcher.machine import Machine
from vllm_fleet.launcher.processes import boot_id, identify
from vllm_fleet.launcher.record import ChildState, FleetRecord, Phase, ProcessRecord, write_record
from vllm_fleet.launcher.rundir import RunDir
from vllm_fleet.launcher.spec import ProcessSpec
from vllm_fleet.net.sockets import free_port

HEAVY = ("torch", "vllm", "aiohttp", "pydantic", "yaml", "rich", "msgspec", "asyncio")
SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *args):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, str]:
    """An environment and a current folder without a fleet."""
    for name in [name for name in os.environ if name.startswith("FLEET_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_FLEET_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return dict(os.environ)


def call(monkeypatch: pytest.MonkeyPatch, *args: str) -> int | str | None:
    """``vllm-fleet ARGS`` in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["vllm-fleet", *args])
    with pytest.raises(SystemExit) as caught:
        main.main()
    return caught.value.code


def test_help_is_light() -> None:
    code = (
        "import sys\nfrom vllm_fleet.cli.main import main\nsys.argv = ['vllm-fleet', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print('LOADED', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=15)
    assert "Many vLLM instances as one service." in done.stdout
    assert done.stdout.splitlines()[-1] == "LOADED []"
    assert done.stderr == ""


def test_every_command_has_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["up"], ["status"], ["down"], ["logs"], ["scale"], ["role"], ["drain"], ["restart"],
                    ["config", "explain"], ["version"]):  # fmt: skip
        assert call(monkeypatch, *command, "--help") == 0
        assert f"Usage: vllm-fleet {' '.join(command)}" in capsys.readouterr().out


def test_an_unknown_key_is_one_sentence_and_code_2(tmp_path: Path, environ: Mapping[str, str]) -> None:
    (tmp_path / "fleet.yaml").write_text("model: m\nprefil: 1\n")
    done = subprocess.run(
        [sys.executable, "-m", "vllm_fleet.cli.main", "up"], env=environ, capture_output=True, text=True, timeout=15
    )
    assert done.returncode == 2
    assert done.stderr == "unknown key 'prefil' in fleet.yaml; did you mean 'prefill'?\n"
    assert done.stdout == ""


def test_a_model_that_is_not_there_starts_nothing(
    environ: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for extra in ([], ["--detach"]):
        assert call(monkeypatch, "up", "--model", "./absent", *extra) == 2
        assert capsys.readouterr().err == f"model: there is no folder {tmp_path}/absent\n"
    assert not (tmp_path / "home").exists()


def test_commands_without_a_fleet(
    environ: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["status"], ["status", "--json"], ["down"]):
        assert call(monkeypatch, *command) == 1
        out, err = capsys.readouterr()
        assert (out, err) == ("", f"no fleet named 'default' runs (looked in {tmp_path}/home/default)\n")
    assert call(monkeypatch, "logs", "router", "--name", "x") == 1
    assert capsys.readouterr().err == (
        f"there is no log of 'router' in fleet 'x'; there are none in {tmp_path}/home/x/logs\n"
    )
    assert call(monkeypatch, "status", "--name", "../x") == 2
    assert call(monkeypatch, "version") == 0


def test_logs_prints_the_whole_log(
    environ: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "home" / "default" / "logs"
    folder.mkdir(parents=True)
    (folder / "router.log").write_text("one\ntwo\nthree")
    assert call(monkeypatch, "logs", "router") == 0
    assert capsys.readouterr().out == "one\ntwo\nthree\n"
    assert call(monkeypatch, "logs", "../../../secret") == 1


def test_explain_shows_value_and_origin(
    environ: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLEET_DECODE", "3")
    (tmp_path / "fleet.yaml").write_text("model: org/m\n")
    assert call(monkeypatch, "config", "explain", "--router-port", "9", "--vllm-arg=--x", "--env", "A=b=c") == 0
    rows = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert ["model", "org/m", "fleet.yaml"] in rows
    assert ["decode", "3", "environment variable FLEET_DECODE"] in rows
    assert ["router.port", "9", "flag --router-port"] in rows
    assert ["vllm_args", '["--x"]', "flag --vllm-arg"] in rows
    assert ["env.A", "b=c", "flag --env"] in rows
    assert call(monkeypatch, "config", "explain", "--json") == 0
    assert json.loads(capsys.readouterr().out)[1]["value"] == "org/m"


def test_flags_that_were_not_typed_are_absent() -> None:
    assert flags.collect(None, None, None, None, None, None, None, None, None, None) == {}
    assert flags.collect("m", 0, None, None, [], None, None, 0, None, ["tcp"]) == {
        "model": ("--model", "m"),
        "prefill": ("--prefill", 0),
        "router.port": ("--router-port", 0),
        "fabric.transports": ("--transport", ["tcp"]),
    }
    with pytest.raises(ConfigError, match=r"^--env: expected NAME=VALUE, found 'A'$"):
        flags.collect(None, None, None, None, None, ["A"], None, None, None, None)


def fake_plan(ports: Mapping[str, int]) -> tuple[ProcessSpec, ...]:
    def one(name: str) -> tuple[str, ...]:
        return (sys.executable, "-S", "-c", SERVER, str(ports[name]))

    urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    return (
        ProcessSpec("controller", "controller", "controller", one("controller"), urls["controller"]),
        ProcessSpec("router", "router", "router", one("router"), urls["router"]),
        ProcessSpec("both-0", "instance", "both", one("both-0"), urls["both-0"]),
    )


class OwnPlanner(StaticPlanner):
    """As `up` makes one."""

    fixed: frozenset[str] = frozenset()


def planner_of(make: Make) -> Callable[[FleetConfig, Machine, RunDir], OwnPlanner]:
    def made(config: FleetConfig, machine: Machine, run: RunDir) -> OwnPlanner:
        run.prepare([])
        return OwnPlanner(make, {name: free_port("127.0.0.1") for name in ("controller", "router", "both-0")})

    return made


def test_up_serves_until_ctrl_c(
    environ: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    monkeypatch.setattr(up_module, "FleetPlanner", planner_of(fake_plan))
    announced = up_command.ready_text

    def then_interrupt(record: FleetRecord, *, detached: bool) -> str:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        return announced(record, detached=detached)

    monkeypatch.setattr(up_command, "ready_text", then_interrupt)
    assert call(monkeypatch, "up", "--model", "./tiny", "--both", "1", "--router-port", "0") == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split() == ["NAME", "ROLE", "URL", "PID", "STATE"]
    assert [line.split()[0] for line in out.splitlines()[1:4]] == ["controller", "router", "both-0"]
    assert "/v1 (stop it with Ctrl-C)" in out
    assert '"model": "tiny"' in out
    assert "both-0: starting" in err
    assert "both-0: stopped" in err
    assert "Traceback" not in out + err
    left = sorted(path.name for path in (tmp_path / "home" / "default").iterdir())
    assert left == ["lock", "logs"]
    assert "child.start" in (tmp_path / "home" / "default" / "logs" / "supervisor.log").read_text()


def test_up_that_fails_says_why(
    environ: Mapping[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def dying(ports: Mapping[str, int]) -> tuple[ProcessSpec, ...]:
        controller, *others = fake_plan(ports)
        argv = (sys.executable, "-S", "-c", "raise ValueError('no such thing')")
        return ProcessSpec("controller", "controller", "controller", argv, controller.url), *others

    monkeypatch.setattr(up_module, "FleetPlanner", planner_of(dying))
    assert call(monkeypatch, "up", "--model", "org/m", "--both", "1", "--router-port", "0") == 1
    lines = capsys.readouterr().err.splitlines()
    reason = "controller ended with exit code 1: ValueError: no such thing (while it was starting)"
    assert lines[lines.index(reason) + 1 :] == [
        '    File "<string>", line 1, in <module>',
        "  ValueError: no such thing",
        f"log: {tmp_path}/home/default/logs/controller.log",
    ]


def record(phase: Phase, state: ChildState) -> FleetRecord:
    me = identify(os.getpid())
    assert me is not None
    made = (
        ProcessRecord("router", "router", "router", "http://127.0.0.1:8000", state, 0.0, "/log", me),
        ProcessRecord("controller", "controller", "controller", "http://127.0.0.1:1", state, 0.0, "/log"),
    )
    return FleetRecord("f", "m", boot_id(), me, phase, 8.0, made)


def test_views_show_changes_and_announce_once(capsys: pytest.CaptureFixture[str]) -> None:
    announced: list[FleetRecord] = []
    for view in (Plain(announced.append), Live(announced.append)):
        with view:
            view.show(record("starting", "waiting"))
            view.show(record("starting", "starting"))
            view.note("hear [this]")
            view.ready(record("serving", "ready"))
            view.show(record("serving", "ready"))
            view.show(record("serving", "gone"))
        err = capsys.readouterr().err
        assert "hear [this]" in err
        assert "router: gone" in err
    assert announced == [record("serving", "ready")] * 2


def test_the_table_lines_up() -> None:
    made = record("serving", "ready")
    text = table(made, {"router": "ready", "controller": "gone"}).splitlines()
    assert text[0].split() == ["NAME", "ROLE", "URL", "PID", "STATE"]
    assert text[2].split() == ["controller", "controller", "http://127.0.0.1:1", "-", "gone"]
    assert {line.index("http") for line in text[1:]} == {text[0].index("URL")}


def test_status_of_a_fleet_whose_processes_are_gone(
    environ: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path / "home" / "f")
    run.acquire()
    write_record(run, record("serving", "ready"))
    run.release()
    assert call(monkeypatch, "status", "--name", "f", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {
        "router": {"url": "http://127.0.0.1:8000", "admin_url": "http://127.0.0.1:8000"},
        "controller": {"url": "http://127.0.0.1:1"}, "instances": [],
        "desired": {"prefill": 0, "decode": 0, "both": 0},
    }  # fmt: skip
    assert "the controller does not answer" in err
