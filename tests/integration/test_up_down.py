"""`vllm-fleet up` and its mistakes, as a user meets them, with real vLLM where it gets that far."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import COMMAND, MODEL, RunningFleet, fleet_command
from vllm_fleet.bench.plain import scrape, total

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


def of_fleet(home: Path) -> list[psutil.Process]:
    """Processes whose environment names this state folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("VLLM_FLEET_HOME") == str(home):
                found.append(process)
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_prints_a_table_and_stops_within_ten_seconds(tmp_path: Path, number: signal.Signals) -> None:
    before = shared_memory()
    env = {**os.environ, "VLLM_FLEET_HOME": str(tmp_path)}
    command = [COMMAND, "up", "--model", str(MODEL), "--router-port", "0"]
    up = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert up.stdout is not None
    lines = []
    for line in up.stdout:
        lines.append(line)
        if line.startswith("ready: "):
            break
    text = "".join(lines)
    for name in ("controller", "router", "prefill-0", "decode-0"):
        assert re.search(rf"^{name} .*http://127\.0\.0\.1:\d+ .*ready", text, re.MULTILINE), text
    ports = [int(port) for port in re.findall(r"127\.0\.0\.1:(\d+)", text)]
    assert of_fleet(tmp_path)
    began = time.monotonic()
    up.send_signal(number)
    rest, _ = up.communicate(timeout=30)
    assert time.monotonic() - began < 10, rest
    assert up.returncode == 0, rest
    assert of_fleet(tmp_path) == []
    assert shared_memory() <= before
    for port in set(ports):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0, f"something still listens on {port}"


def test_status_and_logs_from_another_terminal(cma_fleet: RunningFleet) -> None:
    status = cma_fleet.status()
    assert set(status) == {"router", "controller", "instances", "desired"}
    assert status["desired"] == {"prefill": 1, "decode": 1, "both": 0}
    for instance in status["instances"]:
        assert set(instance) == {"name", "role", "url", "pid", "state", "note", "computes_below_tokens"}
        assert instance["state"] == "ready"
        assert psutil.pid_exists(instance["pid"])
    assert [instance["role"] for instance in status["instances"]] == ["prefill", "decode"]
    assert "prefill-0" in cma_fleet.command("status").stdout
    assert "vLLM" in cma_fleet.command("logs", "decode-0").stdout
    assert total(scrape(cma_fleet.router_admin), "vllm_fleet_router_handoffs_without_bytes") == 0


def test_a_second_fleet_of_the_same_name_is_refused(cma_fleet: RunningFleet) -> None:
    second = fleet_command(cma_fleet.home, "up", "--model", str(MODEL), "--router-port", "0")
    assert second.returncode != 0
    assert "already" in second.stderr
    assert str(cma_fleet.home) in second.stderr


def test_a_taken_port_is_named_before_anything_starts(tmp_path: Path, cma_fleet: RunningFleet) -> None:
    port = cma_fleet.router.rpartition(":")[2]
    began = time.monotonic()
    up = fleet_command(tmp_path, "up", "--model", str(MODEL), "--router-port", port)
    assert up.returncode == 2
    assert "router.port" in up.stderr
    assert port in up.stderr
    assert time.monotonic() - began < 10
    assert of_fleet(tmp_path) == []


def test_a_missing_model_is_one_sentence(tmp_path: Path) -> None:
    up = fleet_command(tmp_path, "up", "--model", str(tmp_path / "nowhere"), "--router-port", "0")
    assert up.returncode == 2
    assert "nowhere" in up.stderr
    assert "Traceback" not in up.stderr


def test_an_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    config = tmp_path / "fleet.yaml"
    config.write_text(f"model: {MODEL}\nprefil: 2\n")
    up = fleet_command(tmp_path, "up", "--config", str(config))
    assert up.returncode == 2
    assert "'prefil'" in up.stderr
    assert "'prefill'" in up.stderr


def test_an_instance_that_dies_at_start_ends_up_with_its_last_words(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in MODEL.iterdir():
        if file.suffix == ".json":
            (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors").write_bytes(b"not a checkpoint")
    up = fleet_command(tmp_path, "up", "--model", str(broken), "--router-port", "0", timeout_s=200)
    assert up.returncode == 1
    assert "prefill-0" in up.stdout + up.stderr or "decode-0" in up.stdout + up.stderr
    assert "afetensor" in up.stdout + up.stderr
    assert of_fleet(tmp_path) == []
