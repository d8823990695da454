"""Length-prefixed frames: four bytes of big-endian length, then that many bytes. Sans-IO."""

from __future__ import annotations

import struct

from vllm_fleet.core.errors import Corrupt

HEADER = struct.Struct(">I")


def encode_frame(payload: bytes) -> bytes:
    """The bytes of one frame."""
    return HEADER.pack(len(payload)) + payload


def frame_length(header: bytes, bytes_max: int) -> int:
    """The payload length a four-byte header announces; Corrupt, before any allocation, when over ``bytes_max``."""
    (length,) = HEADER.unpack(header)
    if length > bytes_max:
        raise Corrupt(f"a frame of {length} bytes was announced; at most {bytes_max} are taken here")
    return int(length)


class FrameReader:
    """Cuts a byte stream into frames.

    Feed it what arrives, in pieces of any size; it keeps at most one incomplete frame of ``bytes_max``.
    """

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self._buffer = bytearray()

    def feed(self, received: bytes) -> list[bytes]:
        """Frames completed by ``received``; Corrupt when a header announces too much."""
        self._buffer += received
        frames: list[bytes] = []
        while len(self._buffer) >= HEADER.size:
            length = frame_length(bytes(self._buffer[: HEADER.size]), self.bytes_max)
            end = HEADER.size + length
            if len(self._buffer) < end:
                break
            frames.append(bytes(self._buffer[HEADER.size : end]))
            del self._buffer[:end]
        return frames

    @property
    def pending_bytes(self) -> int:
        """Bytes of the frame that is not complete yet."""
        return len(self._buffer)
