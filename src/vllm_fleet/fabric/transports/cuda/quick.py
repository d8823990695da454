"""The driver's calls on the path of a short read, bound once: nothing is looked up by name, and the GIL is kept.

A call that gives the GIL away can get it back 5 ms later (sys.getswitchinterval), fifty times what a 32 MiB copy takes;
none of these waits for the GPU, so holding it costs others a microsecond. Launches give it away: the driver's queue may
be full, and the kernel has been started by the time it is wanted back.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable
from typing import Protocol

from vllm_fleet.core.errors import LinkError
from vllm_fleet.fabric.transports.cuda import driver

_NOT_READY = 600
_WIDTHS: dict[str, type[ctypes.c_int64 | ctypes.c_int32]] = {"64": ctypes.c_int64, "32": ctypes.c_int32}
_SCRATCH_MAX = 2  # pointers that Triton 3.3 to 3.9 adds behind a kernel's own parameters


@functools.cache
def _library() -> ctypes.PyDLL:
    driver.device_count()  # CUDA is started, or says why it is not
    library = ctypes.PyDLL("libcuda.so.1")
    library.cuCtxPushCurrent_v2.argtypes = [ctypes.c_void_p]
    library.cuCtxPopCurrent_v2.argtypes = library.cuEventQuery.argtypes = [ctypes.c_void_p]
    return library


class Here(driver.current):
    """As driver.current; to be made once and entered often, by any thread."""

    def __init__(self, device: int) -> None:
        super().__init__(device)
        library = _library()
        self._push, self._pop = library.cuCtxPushCurrent_v2, library.cuCtxPopCurrent_v2

    def __enter__(self) -> None:
        if self._push(self._context):
            super().__enter__()  # fails alike, with words

    def __exit__(self, *raised: object) -> None:
        self._pop(ctypes.byref(ctypes.c_void_p()))


class Event(driver.Event):
    """As driver.Event; asked often."""

    def __init__(self, device: int) -> None:
        super().__init__(device)
        self._query = _library().cuEventQuery
        self._here = Here(device)

    def passed(self) -> bool:
        with self._here:
            code = self._query(self._handle)
        return code == 0 if code in (0, _NOT_READY) else super().passed()


class Compiled(Protocol):
    """What is used of triton.compiler.CompiledKernel."""

    name: str
    function: int
    asm: dict[str, str]
    metadata: object


def parameters(ptx: str, name: str, own: int) -> list[type[ctypes.c_int64 | ctypes.c_int32]] | None:
    """The kernel's parameters, of which the first ``own`` are integers of ours and others scratch pointers.

    None when they are anything else.
    """
    entry = re.search(rf"\.entry\s+{re.escape(name)}\s*\((.*?)\)", ptx, re.DOTALL)
    if entry is None:
        return None
    given = [text.strip() for text in entry[1].split(",") if text.strip()]
    kinds = [re.match(r"\.param\s+\.[usb](32|64)\s", text) for text in given]
    scratch = given[own:]
    if len(given) < own or len(scratch) > _SCRATCH_MAX or None in kinds:
        return None
    if any(".ptr" in text for text in given[:own]) or any(".ptr" not in text for text in scratch):
        return None
    return [_WIDTHS[kind[1]] for kind in kinds if kind is not None]


Launch = Callable[[int, int, tuple[int, ...]], int]
"""Grid, stream, arguments; returns CUDA's error code, 0 for none."""


def launcher(compiled: Compiled, own: int) -> Launch | None:
    """Start a compiled kernel of ``own`` integers through cuLaunchKernel, without Triton's steps in between.

    None when the kernel needs what only Triton's launcher knows: scratch memory, clusters, anything new. What is
    returned is for one thread at a time.
    """
    meta = compiled.metadata
    plain = {"num_ctas": 1, "global_scratch_size": 0, "profile_scratch_size": 0, "launch_cooperative_grid": False}
    if any(getattr(meta, key, value) != value for key, value in plain.items()) or getattr(meta, "launch_pdl", False):
        return None
    kinds = parameters(compiled.asm["ptx"], compiled.name, own)
    if kinds is None or not isinstance(compiled.function, int):
        return None
    threads, shared = getattr(meta, "num_warps", 0) * 32, getattr(meta, "shared", 0)
    values = [kind(0) for kind in kinds]
    addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    start = _start_function()
    function = ctypes.c_void_p(compiled.function)

    def launch(grid: int, stream: int, arguments: tuple[int, ...]) -> int:
        if len(arguments) != own:
            raise TypeError(f"{compiled.name} takes {own} arguments, not {len(arguments)}")
        for value, argument in zip(values, arguments, strict=False):  # all values must live as long as their addresses
            value.value = argument
        return start(function, grid, 1, 1, threads, 1, 1, shared, stream, addresses, None)

    return launch


@functools.cache
def _start_function() -> Callable[..., int]:
    library = ctypes.CDLL("libcuda.so.1")  # as in driver.py: gives the GIL away
    number, pointer = ctypes.c_uint, ctypes.c_void_p
    library.cuLaunchKernel.argtypes = [pointer, *[number] * 7, pointer, pointer, pointer]
    start: Callable[..., int] = library.cuLaunchKernel
    return start


def failed(code: int, device: int) -> LinkError:
    """The error for a launch that returned ``code``."""
    return LinkError(f"starting a kernel on CUDA device {device} failed: CUDA error {code}")
