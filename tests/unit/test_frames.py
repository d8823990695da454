"""Frames: any cut of the stream gives the same frames; too long is refused before it is read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_fleet.core.errors import Corrupt
from vllm_fleet.wire.frames import HEADER, FrameReader, encode_frame


@given(st.lists(st.binary(max_size=50), max_size=8), st.lists(st.integers(1, 30), max_size=60))
def test_any_cut_gives_the_same_frames(payloads: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(encode_frame(payload) for payload in payloads)
    reader, got, at = FrameReader(50), [], 0
    for cut in [*cuts, len(stream)]:
        got += reader.feed(stream[at : at + cut])
        at += cut
    assert got == payloads
    assert reader.pending_bytes == 0


@pytest.mark.parametrize("length", [51, 2**31, 2**32 - 1])
def test_a_longer_frame_is_refused_by_its_header(length: int) -> None:
    reader = FrameReader(50)
    with pytest.raises(Corrupt, match=f"a frame of {length} bytes was announced; at most 50"):
        reader.feed(HEADER.pack(length))
    assert reader.pending_bytes == HEADER.size


@given(st.binary(max_size=40))
def test_a_cut_session_leaves_only_the_last_frame_pending(payload: bytes) -> None:
    stream = encode_frame(b"first") + encode_frame(payload)
    for end in range(len(stream)):
        reader = FrameReader(50)
        frames = reader.feed(stream[:end])
        assert sum(HEADER.size + len(frame) for frame in frames) + reader.pending_bytes == end
