"""Compiling and starting Triton kernels. Imports torch and triton: ConfigError where they are missing."""

from __future__ import annotations

import subprocess
import threading
from typing import Any

from vllm_fleet.core.errors import ConfigError, LinkError
from vllm_fleet.fabric.transports.cuda import quick

try:
    import torch
    import triton

    from vllm_fleet.fabric.transports.cuda import programs
except ImportError as error:
    raise ConfigError(f"CUDA kernels need {error.name}: pip install 'vllm-fleet[cuda]'") from error

__all__ = ["INTERPRETED", "Kernel", "programs"]

INTERPRETED = not isinstance(programs.copy_kernel, triton.runtime.JITFunction)
"""Whether the kernels run in Triton's interpreter, on CPU addresses."""

_compiled: dict[tuple[str, int, int, tuple[int, ...]], Any] = {}
_compile_lock = threading.Lock()


class Kernel:
    """A compiled kernel of one device: ``kernel(grid, stream, arguments)`` starts it. Its context is current then.

    Made before the context is made current: torch changes which one is. For one thread at a time. The compiled kernel
    is launched directly: Triton's own dispatch costs 20 us more per launch, 0.2 of the time of a 32 MiB copy.
    """

    def __init__(
        self, function: Any, device: int, example: tuple[int, ...], constants: tuple[int, ...], warps: int
    ) -> None:
        self._function, self._device, self._constants, self._warps = function, device, constants, warps
        self._runners: dict[int, Any] = {}
        self._launch: quick.Launch | None = None
        if INTERPRETED:
            return
        key = (function.__name__, device, warps, constants)
        if key not in _compiled:
            try:
                with _compile_lock, torch.cuda.device(device):
                    compiled = function.warmup(*example, *constants, num_warps=warps, grid=(1,))
                    compiled._init_handles()
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                raise LinkError(f"Triton cannot compile a kernel here (it needs a C compiler): {error}") from error
            _compiled[key] = compiled
        self._compiled = _compiled[key]
        self._launch = quick.launcher(self._compiled, len(example))

    @property
    def is_direct(self) -> bool:
        """Whether it is started without Triton's launcher."""
        return self._launch is not None

    def __call__(self, grid: int, stream: int, arguments: tuple[int, ...]) -> None:
        if self._launch is not None:
            code = self._launch(grid, stream, arguments)
            if code:
                raise quick.failed(code, self._device)
            return
        if INTERPRETED:
            self._function[(grid,)](*arguments, *self._constants, num_warps=self._warps)
            return
        runner = self._runners.get(grid)
        if runner is None:
            runner = self._runners[grid] = self._compiled[(grid, 1, 1)]
        try:
            runner(*arguments, *self._constants, stream=stream)
        except RuntimeError as error:
            raise LinkError(f"starting a kernel on CUDA device {self._device} failed: {error}") from error
