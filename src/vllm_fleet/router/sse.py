"""Passing a server-sent event stream on, so that a broken one can still end with a readable event. Sans-IO."""

from __future__ import annotations

from vllm_fleet.core import limits

_DONE = b"data: [DONE]"
_GAPS = (b"\n\n", b"\r\n\r\n")


class EventStream:
    """Passes bytes on unchanged, but only up to the end of a complete event.

    vLLM writes whole events, so nothing waits here in practice; when an instance dies in the middle of one, the half
    event is dropped instead of running into the error event behind it.
    """

    def __init__(self) -> None:
        self._tail = b""
        self.done = False
        """Whether the stream said that it is complete."""

    def feed(self, received: bytes) -> bytes:
        """The bytes that can be passed on now."""
        data = self._tail + received if self._tail else received
        end = max(position + len(gap) if (position := data.rfind(gap)) >= 0 else 0 for gap in _GAPS)
        if len(data) - end > limits.STREAM_TAIL_BYTES_MAX:
            end = len(data)
        whole, self._tail = data[:end], data[end:]
        if whole:
            self.done = self.done or whole[-64:].rstrip().endswith(_DONE)
        return whole

    def rest(self) -> bytes:
        """What is left when the stream ended by itself."""
        tail, self._tail = self._tail, b""
        self.done = self.done or tail.rstrip().endswith(_DONE)
        return tail
