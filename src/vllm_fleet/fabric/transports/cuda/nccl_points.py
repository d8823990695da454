"""Points in the streams of an nccl pipe: the driver's calls on them, bound once, with the GIL kept (see quick.py).

The stream is a CUstream, and the context of the device is current, in every call.
"""

from __future__ import annotations

import ctypes
import functools

from vllm_fleet.fabric.contract import TransferError
from vllm_fleet.fabric.transports.cuda import driver

_NOT_READY = 600


@functools.cache
def _library() -> ctypes.PyDLL:
    driver.device_count()  # CUDA is started, or says why it is not
    library = ctypes.PyDLL("libcuda.so.1")
    library.cuEventRecord.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.cuStreamWaitEvent.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint]
    library.cuEventQuery.argtypes = library.cuStreamQuery.argtypes = [ctypes.c_void_p]
    return library


class Point(driver.Event):
    """An event that streams wait for: 1 us a call, where torch.cuda.Event takes 2 to 3."""

    def __init__(self, device: int) -> None:
        super().__init__(device)
        library, self._at = _library(), ctypes.c_void_p(self._handle)
        self._record, self._hold, self._query = (
            library.cuEventRecord,
            library.cuStreamWaitEvent,
            library.cuEventQuery,
        )

    def record(self, stream: int) -> None:
        if code := self._record(self._at, stream):
            raise _failed("recording an event", code)

    def hold(self, stream: int) -> None:
        """What ``stream`` is given from now on starts when the stream of the last record() has come so far."""
        if code := self._hold(stream, self._at, 0):
            raise _failed("waiting for an event in a stream", code)

    def passed(self) -> bool:
        code = self._query(self._at)
        if code not in (0, _NOT_READY):
            raise _failed("a kernel", code)
        return bool(code == 0)


def is_quiet(stream: int) -> bool:
    """Whether all that a stream was given has ended; True, too, where CUDA failed: nothing runs then."""
    return bool(_library().cuStreamQuery(stream) != _NOT_READY)


def _failed(what: str, code: int) -> TransferError:
    return TransferError(f"{what} failed: CUDA error {code}")
