"""The CUDA driver API through ctypes on libcuda.so.1: devices, IPC handles, pinned memory, streams and events.

Loaded at the first call. Work goes to each device's primary context, the one that torch uses. Every failure is a
LinkError with the name CUDA gives it. Names and enum values: cuda.h of CUDA 13.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import Final

import numpy as np

from vllm_fleet.core.errors import LinkError
from vllm_fleet.fabric.plan import Ints

HANDLE_BYTES: Final = 64  # CU_IPC_HANDLE_SIZE
UUID_BYTES: Final = 16
_LAZY_PEER_ACCESS: Final = 1
_ATTRIBUTE_MEMORY_TYPE: Final = 2
_ATTRIBUTE_DEVICE_ORDINAL: Final = 9
_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE: Final = 13
_MEMORY_TYPE_DEVICE: Final = 2
_STREAM_NON_BLOCKING: Final = 1
_EVENT_DISABLE_TIMING: Final = 2
_HOST_PORTABLE: Final = 1
_NOT_READY: Final = 600

NOT_IPC = (
    "the pool was made by CUDA's virtual memory functions and cannot be shared between processes: start vLLM with "
    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False and without sleep mode"
)


class IpcHandle(ctypes.Structure):
    """CUipcMemHandle, which is passed by value."""

    _fields_ = (("reserved", ctypes.c_ubyte * HANDLE_BYTES),)


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise LinkError(f"there is no NVIDIA driver on this machine: {error}") from error
    pointer, address, size, number = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_int
    library.cuIpcOpenMemHandle_v2.argtypes = [pointer, IpcHandle, ctypes.c_uint]
    library.cuIpcGetMemHandle.argtypes = [pointer, address]
    library.cuIpcCloseMemHandle.argtypes = [address]
    library.cuMemGetAddressRange_v2.argtypes = [pointer, pointer, address]
    library.cuPointerGetAttribute.argtypes = [pointer, number, address]
    library.cuMemAlloc_v2.argtypes = [pointer, size]
    library.cuMemFree_v2.argtypes = [address]
    library.cuMemHostAlloc.argtypes = [pointer, size, ctypes.c_uint]
    library.cuMemFreeHost.argtypes = [pointer]
    library.cuMemcpyHtoDAsync_v2.argtypes = [address, pointer, size, pointer]
    library.cuMemcpyDtoHAsync_v2.argtypes = [pointer, address, size, pointer]
    library.cuMemcpyDtoDAsync_v2.argtypes = [address, address, size, pointer]
    library.cuMemsetD8Async.argtypes = [address, ctypes.c_ubyte, size, pointer]
    library.cuStreamCreateWithPriority.argtypes = [pointer, ctypes.c_uint, number]
    for name in ("StreamSynchronize", "StreamDestroy_v2", "EventSynchronize", "EventQuery", "EventDestroy_v2"):
        getattr(library, f"cu{name}").argtypes = [pointer]
    library.cuEventCreate.argtypes, library.cuEventRecord.argtypes = [pointer, ctypes.c_uint], [pointer, pointer]
    library.cuCtxPushCurrent_v2.argtypes = [pointer]
    library.cuDevicePrimaryCtxRetain.argtypes = [pointer, number]
    _raise_for(library, library.cuInit(0), "starting CUDA")
    return library


def _raise_for(library: ctypes.CDLL, code: int, doing: str) -> None:
    if code == 0:
        return
    name, text = ctypes.c_char_p(b"an error unknown here"), ctypes.c_char_p(b"unknown")
    library.cuGetErrorName(code, ctypes.byref(name))
    library.cuGetErrorString(code, ctypes.byref(text))
    raise LinkError(f"{doing} failed: {(name.value or b'').decode()} ({(text.value or b'').decode()})")


def _call(function: str, doing: str, *arguments: object) -> None:
    library = _library()
    code = getattr(library, function)(*arguments)
    if code:
        _raise_for(library, code, doing)


# Devices -------------------------------------------------------------------------------------------------------------
_contexts: dict[int, ctypes.c_void_p] = {}
_contexts_lock = threading.Lock()


class current:  # noqa: N801 - used as a verb: with current(device)
    """Make the device's primary context the calling thread's for the time of a ``with`` block."""

    def __init__(self, device: int) -> None:
        self._context = _contexts.get(device) or _retain(device)

    def __enter__(self) -> None:
        _call("cuCtxPushCurrent_v2", "using a CUDA device", self._context)

    def __exit__(self, *raised: object) -> None:
        _library().cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


def _retain(device: int) -> ctypes.c_void_p:
    with _contexts_lock:
        if device not in _contexts:
            context = ctypes.c_void_p()
            _call("cuDevicePrimaryCtxRetain", f"using CUDA device {device}", ctypes.byref(context), device)
            _contexts[device] = context
        return _contexts[device]


def device_count() -> int:
    """CUDA devices that this process sees."""
    count = ctypes.c_int()
    _call("cuDeviceGetCount", "counting CUDA devices", ctypes.byref(count))
    return count.value


def device_uuid(device: int) -> bytes:
    """What names a device (or MIG slice) in every process, however each one numbers them; UUID_BYTES bytes."""
    uuid = (ctypes.c_ubyte * UUID_BYTES)()
    _call("cuDeviceGetUuid_v2", f"asking for the UUID of CUDA device {device}", ctypes.byref(uuid), device)
    return bytes(uuid)


def find_device(uuid: bytes) -> int | None:
    """This process's number for a device; None when CUDA_VISIBLE_DEVICES hides it or it is not in this machine."""
    return next((device for device in range(device_count()) if device_uuid(device) == uuid), None)


def can_access_peer(device: int, peer: int) -> bool:
    """Whether kernels on ``device`` can reach memory of ``peer`` (NVLink, or PCIe peer to peer)."""
    able = ctypes.c_int(device == peer)
    if device != peer:
        _call("cuDeviceCanAccessPeer", "asking for peer access", ctypes.byref(able), device, peer)
    return able.value != 0


# Memory --------------------------------------------------------------------------------------------------------------
def _attribute(kind: int, address: int) -> int:
    value = ctypes.c_uint(0)
    _call("cuPointerGetAttribute", f"asking CUDA about address {address:#x}", ctypes.byref(value), kind, address)
    return value.value


def pointer_device(address: int) -> int:
    """The device whose memory this is; LinkError for host memory and for what CUDA does not know."""
    if _attribute(_ATTRIBUTE_MEMORY_TYPE, address) != _MEMORY_TYPE_DEVICE:
        raise LinkError(f"the address {address:#x} is no CUDA device memory")
    return _attribute(_ATTRIBUTE_DEVICE_ORDINAL, address)


def allocation(device: int, address: int) -> tuple[int, int]:
    """Base address and bytes of the allocation that holds ``address``."""
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    with current(device):
        _call("cuMemGetAddressRange_v2", "asking for an allocation", ctypes.byref(base), ctypes.byref(size), address)
    return base.value, size.value


def export(device: int, base: int) -> bytes:
    """The handle by which another process can map the allocation at ``base``; LinkError says how to make it one."""
    if not _attribute(_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, base):
        raise LinkError(NOT_IPC)
    handle = IpcHandle()
    with current(device):
        try:
            _call("cuIpcGetMemHandle", "making a CUDA IPC handle", ctypes.byref(handle), base)
        except LinkError as error:
            raise LinkError(f"{error}; {NOT_IPC}") from error
    return bytes(handle.reserved)


def open_handle(device: int, handle: bytes) -> int:
    """Map another process's allocation for kernels on ``device``; its base address here.

    The same handle opened twice is mapped once and counted (cuda.h), so each open needs its own close_handle().
    """
    address = ctypes.c_uint64()
    given = IpcHandle.from_buffer_copy(handle)
    with current(device):
        _call("cuIpcOpenMemHandle_v2", "mapping the peer's memory", ctypes.byref(address), given, _LAZY_PEER_ACCESS)
    return address.value


def close_handle(device: int, address: int) -> None:
    """Undo one open_handle()."""
    with current(device):
        _call("cuIpcCloseMemHandle", "unmapping the peer's memory", address)


def allocate(device: int, nbytes: int) -> int:
    """Device memory that is an allocation of its own."""
    address = ctypes.c_uint64()
    with current(device):
        _call("cuMemAlloc_v2", f"allocating {nbytes} bytes on CUDA device {device}", ctypes.byref(address), nbytes)
    return address.value


def free(device: int, address: int) -> None:
    """Undo allocate()."""
    with current(device):
        _call("cuMemFree_v2", "freeing device memory", address)


class Pinned:
    """Host memory that the device reads and writes by the same address; ``words`` is int64 of shape [nbytes / 8]."""

    def __init__(self, device: int, nbytes: int) -> None:
        pointer = ctypes.c_void_p()
        with current(device):
            _call("cuMemHostAlloc", f"pinning {nbytes} bytes", ctypes.byref(pointer), nbytes, _HOST_PORTABLE)
        self.address = pointer.value or 0
        self.words: Ints = np.frombuffer(memoryview((ctypes.c_char * nbytes).from_address(self.address)), np.int64)
        self._device = device

    def close(self) -> None:
        """Give it back; nothing may use ``words`` any more."""
        if self.address:
            with current(self._device):
                _call("cuMemFreeHost", "freeing pinned memory", self.address)
            self.address = 0


# Streams and events --------------------------------------------------------------------------------------------------
class Stream:
    """A stream that waits for no other one, of the highest priority: short copies get past long computations."""

    def __init__(self, device: int) -> None:
        handle, priority = ctypes.c_void_p(), -(1 << 30)  # CUDA takes the highest there is
        at = ctypes.byref(handle)
        with current(device):
            _call("cuStreamCreateWithPriority", "making a CUDA stream", at, _STREAM_NON_BLOCKING, priority)
        self.device = device
        self.cuda_stream = handle.value or 0

    def synchronize(self) -> None:
        """Wait for all that was given to it."""
        with current(self.device):
            _call("cuStreamSynchronize", "waiting for a CUDA stream", self.cuda_stream)

    def close(self) -> None:
        with current(self.device):
            _call("cuStreamDestroy_v2", "closing a CUDA stream", self.cuda_stream)


class Event:
    """A point in a stream that the host can wait for."""

    def __init__(self, device: int) -> None:
        handle = ctypes.c_void_p()
        with current(device):
            _call("cuEventCreate", "making a CUDA event", ctypes.byref(handle), _EVENT_DISABLE_TIMING)
        self._device, self._handle = device, handle.value or 0

    def record(self, stream: int) -> None:
        """Mark the end of what ``stream`` (a CUstream) was given so far. The device's context is current."""
        _call("cuEventRecord", "recording a CUDA event", self._handle, stream)

    def passed(self) -> bool:
        """Whether the stream has passed the last record(); does not wait."""
        with current(self._device):
            code = _library().cuEventQuery(self._handle)
        if code != _NOT_READY:
            _raise_for(_library(), code, "a kernel")
        return bool(code == 0)

    def wait(self) -> None:
        """Wait for the last record(); at once when there was none."""
        with current(self._device):
            _call("cuEventSynchronize", "waiting for a kernel", self._handle)

    def close(self) -> None:
        with current(self._device):
            _call("cuEventDestroy_v2", "closing a CUDA event", self._handle)


def copy_in(address: int, content: int, nbytes: int, stream: int) -> None:
    """Start a copy from host to device; ``address`` is the device's. The device's context is current."""
    _call("cuMemcpyHtoDAsync_v2", "copying to the device", address, content, nbytes, stream)


def copy_out(content: int, address: int, nbytes: int, stream: int) -> None:
    """Start a copy from device to host. The device's context is current."""
    _call("cuMemcpyDtoHAsync_v2", "copying from the device", content, address, nbytes, stream)


def copy_across(target: int, source: int, nbytes: int, stream: int) -> None:
    """Start a contiguous copy from device to device. The context of one of them is current."""
    _call("cuMemcpyDtoDAsync_v2", "copying between devices", target, source, nbytes, stream)


def clear(address: int, nbytes: int, stream: int) -> None:
    """Start setting device memory to zero. As copy_in."""
    _call("cuMemsetD8Async", "clearing device memory", address, 0, nbytes, stream)
