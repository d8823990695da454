"""`vllm-fleet bench fabric`, run for real and short."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_fleet.bench.plot import plot

COMMAND = str(Path(sys.executable).parent / "vllm-fleet")


@pytest.mark.timeout(120)
def test_a_short_run(tmp_path: Path) -> None:
    figures, picture = tmp_path / "figures.json", tmp_path / "figures.png"
    run = subprocess.run(
        [
            *(COMMAND, "bench", "fabric", "--transport", "cma,tcp,nccl", "--sizes", "1MiB,4MiB", "--rounds", "3"),
            *("--checksums", "full", "--out", str(figures), "--plot", str(picture)),
        ],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(figures.read_text())
    contenders = {"cma", "cma, full checksums", "tcp", "tcp, full checksums"}
    contenders |= {"memcpy in one process", "gather in one process", "raw TCP stream"}
    assert {entry["contender"] for entry in report["rows"]} == contenders
    assert {entry["nbytes"] for entry in report["rows"]} == {1 << 20, 4 << 20}
    assert all(len(entry["seconds"]) == 3 for entry in report["rows"])
    assert {ratio["of"] for ratio in report["ratios"]} == {"cma", "tcp"}
    assert report["checks"].keys() == {"cma, full checksums", "tcp, full checksums"}
    assert "CPU memory" in report["not_run"]["nccl"] or "nccl" in report["not_run"]["nccl"]
    assert "raw TCP stream" in run.stdout
    assert "not run: nccl" in run.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    plot(report, tmp_path / "again.png")


def test_a_wrong_flag_is_one_sentence() -> None:
    run = subprocess.run(
        [COMMAND, "bench", "fabric", "--sizes", "32MB"], capture_output=True, text=True, timeout=30, check=False
    )
    assert run.returncode == 1
    assert "expected sizes like 32MiB or 4GiB" in run.stderr
    assert "Traceback" not in run.stderr
