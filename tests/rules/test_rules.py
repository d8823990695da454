"""The rules that make the architecture hold, proved on the source itself."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "vllm_fleet"

LAYERS = {
    "core": 0, "wire": 1, "config": 2, "net": 3, "fabric": 4,
    "controller": 5, "launcher": 5, "router": 5, "connector": 5,
    "doctor": 6, "bench": 6, "offline": 6, "cli": 7,
}  # fmt: skip
"""Imports go to a smaller number, or stay in the folder. Folders of one number never import one another."""

TORCH_ALLOWED = ("connector/", "fabric/transports/", "bench/")
BANNED_MODULES = {"pickle", "cPickle", "_pickle", "marshal", "dill", "cloudpickle", "shelve", "jsonpickle"}
BANNED_CALLS = {"eval", "exec", "recv_pyobj", "send_pyobj", "all_gather_object", "broadcast_object_list"}
ENVIRON_ALLOWED = ("config/load.py", "launcher/machine.py", "launcher/child.py", "launcher/rundir.py", "bench/plain.py")
LONG_MODULES: dict[str, str] = {}
"""Modules over 300 lines, each with the reason."""


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def name(path: Path) -> str:
    return str(path.relative_to(SOURCE))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: relative import"
            yield node.module or ""


@pytest.mark.parametrize("path", modules(), ids=name)
def test_imports_go_one_way(path: Path) -> None:
    folder = name(path).split("/")[0]
    if folder not in LAYERS:
        return
    for module in imports(path):
        if not module.startswith("vllm_fleet."):
            continue
        other = module.split(".")[1]
        assert other == folder or LAYERS[other] < LAYERS[folder], f"{name(path)} imports {module}"


@pytest.mark.parametrize("path", modules(), ids=name)
def test_only_the_connector_imports_vllm_and_few_import_torch(path: Path) -> None:
    roots = {module.split(".")[0] for module in imports(path)}
    if not name(path).startswith("connector/"):
        assert "vllm" not in roots
    if not name(path).startswith(TORCH_ALLOWED):
        assert "torch" not in roots


@pytest.mark.parametrize("path", modules(), ids=name)
def test_no_code_from_bytes(path: Path) -> None:
    assert BANNED_MODULES.isdisjoint(module.split(".")[0] for module in imports(path))
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        assert called not in BANNED_CALLS, f"{name(path)}:{node.lineno} calls {called}"
        if isinstance(node.func, ast.Attribute) and called == "load":
            assert ast.unparse(node.func) not in ("torch.load", "yaml.load"), f"{name(path)}:{node.lineno}"


@pytest.mark.parametrize("path", modules(), ids=name)
def test_one_door_for_listening(path: Path) -> None:
    if name(path) == "net/sockets.py":
        return
    text = path.read_text()
    assert not re.search(r"\.bind\(\(|\.bind\(address|\.listen\(\d|create_server\(|start_server\(|TCPSite\(", text)
    assert "0.0.0.0" not in text


@pytest.mark.parametrize("path", modules(), ids=name)
def test_the_environment_is_read_in_one_place(path: Path) -> None:
    if name(path) not in ENVIRON_ALLOWED:
        assert not re.search(r"os\.environ|os\.getenv", path.read_text()), "settings come from FleetConfig"


@pytest.mark.parametrize("path", modules(), ids=name)
def test_modules_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    lines = len(text.splitlines())
    assert lines <= 300 or name(path) in LONG_MODULES, f"{name(path)} has {lines} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = (node.end_lineno or 0) - node.lineno
            assert size <= 60, f"{name(path)}: {node.name} has {size} lines"


def test_the_package_and_its_help_stay_light() -> None:
    script = """
import sys, vllm_fleet
before = set(sys.modules)
from vllm_fleet.cli import main
sys.argv = ["vllm-fleet", "--help"]
try:
    main.main()
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = {"torch", "vllm", "aiohttp", "pydantic", "numpy", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20, check=False)
    assert run.returncode == 0, run.stderr
    assert "up" in run.stdout


def test_every_event_is_in_the_list_and_used() -> None:
    from vllm_fleet.core.log import EVENTS

    logged, mentioned = set(), set()
    for path in modules():
        if name(path) == "core/log.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                mentioned.add(node.value)
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
                continue
            first = node.args[0]
            if node.func.attr in ("event", "warn") and isinstance(first, ast.Constant) and isinstance(first.value, str):
                logged.add(first.value)
    assert logged <= set(EVENTS), f"events missing from the list: {sorted(logged - set(EVENTS))}"
    assert set(EVENTS) <= mentioned, f"events nobody logs: {sorted(set(EVENTS) - mentioned)}"
    assert list(EVENTS) == sorted(EVENTS)
