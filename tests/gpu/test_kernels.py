"""The Triton kernels on a GPU, against torch and NumPy. The same file runs on a CPU under TRITON_INTERPRET=1."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from vllm_fleet.fabric.digest import mix64_runs
from vllm_fleet.fabric.plan import Ints

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

triton = pytest.importorskip("triton", reason="needs Triton, which comes with CUDA builds of torch")
torch = pytest.importorskip("torch")
INTERPRETED = bool(triton.knobs.runtime.interpret)
if not INTERPRETED and not list(Path("/dev").glob("nvidia[0-9]*")):
    pytest.skip("needs a CUDA device", allow_module_level=True)

from vllm_fleet.fabric.transports.cuda import driver, kernels  # noqa: E402 - only where Triton is

DEVICE = 0


@dataclass
class Buffers:
    """``nbytes`` of source and target on the device, and the same on the host."""

    nbytes: int

    def __post_init__(self) -> None:
        where = "cpu" if INTERPRETED else f"cuda:{DEVICE}"
        self.content = np.random.default_rng(4).integers(0, 256, self.nbytes, np.uint8)
        self.source = torch.from_numpy(self.content).to(where).clone()
        self.target = torch.zeros(self.nbytes, dtype=torch.uint8, device=where)
        if not INTERPRETED:
            torch.cuda.synchronize()
        self.from_, self.to = aligned(self.source.data_ptr()), aligned(self.target.data_ptr())

    def copy(self, sources: Ints, targets: Ints, nbytes: Ints, programs: int = 64) -> None:
        """Copy runs by offset, and check every byte of the target."""
        stream = make_stream()
        kernels.copy_runs(
            self.from_ + sources, self.to + targets, nbytes, device=DEVICE, stream=stream, programs=programs
        )
        stream.synchronize()
        skip_from, skip_to = self.from_ - self.source.data_ptr(), self.to - self.target.data_ptr()
        wanted = np.zeros(self.nbytes, np.uint8)
        for start, stop, count in zip(sources + skip_from, targets + skip_to, nbytes, strict=True):
            wanted[stop : stop + count] = self.content[start : start + count]
        assert (self.target.cpu().numpy() == wanted).all()


class NoStream:
    """Kernels in Triton's interpreter have ended when they are started."""

    cuda_stream = 0

    def synchronize(self) -> None:
        """Nothing to wait for."""


def make_stream() -> NoStream | driver.Stream:
    return NoStream() if INTERPRETED else driver.Stream(DEVICE)


def aligned(address: int) -> int:
    return -(-address // 16) * 16


def laid_out(nbytes: Ints, gap: int, seed: int) -> Ints:
    """Offsets of runs in random order, each followed by ``gap`` bytes, multiples of 16 apart."""
    order = np.random.default_rng(seed).permutation(len(nbytes))
    room = -(-(nbytes[order] + gap) // 16) * 16
    offsets = np.zeros(len(nbytes), np.int64)
    offsets[order] = np.cumsum(room) - room
    return offsets


@pytest.mark.parametrize("source_skew", [0, 1, 8])
@pytest.mark.parametrize("target_skew", [0, 3, 8])
def test_runs_of_many_lengths_at_many_alignments(source_skew: int, target_skew: int) -> None:
    nbytes = np.array([1, 2, 7, 8, 15, 16, 17, 31, 48, 100, 4095, 4096, 4097, 32768, 32784, 40_001], np.int64)
    sources, targets = laid_out(nbytes, 32, 1) + source_skew, laid_out(nbytes, 32, 2) + target_skew
    Buffers(1 << 18).copy(sources, targets, nbytes)


@pytest.mark.parametrize("programs", [1, 3, 64])
def test_whole_blocks(programs: int) -> None:
    blocks = 8 if INTERPRETED else 512
    nbytes = np.full(blocks, 32 << 10, np.int64)
    Buffers(blocks * (32 << 10) + 16).copy(laid_out(nbytes, 0, 1), laid_out(nbytes, 0, 2), nbytes, programs)


def test_long_runs_are_shared_among_programs() -> None:
    long = (1 << 20) + 48 if INTERPRETED else (200 << 20) + 48
    nbytes = np.array([long, 5, long, 0, 3 << 10], np.int64)
    Buffers(3 * long).copy(laid_out(nbytes, 16, 1), laid_out(nbytes, 16, 2), nbytes)


def test_a_hundred_thousand_runs() -> None:
    count = 500 if INTERPRETED else 100_000
    nbytes = np.full(count, 64, np.int64)
    nbytes[::7] = 24
    buffers = Buffers(count * 64 + 16)
    buffers.copy(laid_out(nbytes, 0, 1), laid_out(nbytes, 0, 2), nbytes)


def test_more_calls_on_one_stream_than_there_are_tables() -> None:
    buffers, stream = Buffers(1 << 20), make_stream()
    calls = 40
    size = (1 << 19) // calls // 16 * 16
    for call in range(calls):
        at = np.array([call * size], np.int64)
        kernels.copy_runs(buffers.from_ + at, buffers.to + at, np.array([size], np.int64), device=DEVICE, stream=stream)
    stream.synchronize()
    skip_from, skip_to = buffers.from_ - buffers.source.data_ptr(), buffers.to - buffers.target.data_ptr()
    got = buffers.target.cpu().numpy()[skip_to : skip_to + calls * size]
    assert (got == buffers.content[skip_from : skip_from + calls * size]).all()


def test_nothing_to_copy() -> None:
    none = np.zeros(0, np.int64)
    Buffers(64).copy(none, none, none)


def digests(buffers: Buffers, offsets: Ints, nbytes: Ints) -> list[int]:
    got = kernels.digest_runs(buffers.source.data_ptr() + offsets, nbytes, device=DEVICE, stream=make_stream())
    return [int(one) for one in got]


@pytest.mark.parametrize("skew", [0, 1, 4])
def test_digests_are_those_of_numpy(skew: int) -> None:
    nbytes = np.array([1, 2, 7, 8, 9, 15, 64, 100, 8191, 8192, 8193, 32768, 300_003], np.int64)
    buffers = Buffers(1 << 19)
    offsets = laid_out(nbytes, 16, 5) + skew
    wanted = mix64_runs([buffers.content[at : at + count] for at, count in zip(offsets, nbytes, strict=True)])
    assert digests(buffers, offsets, nbytes) == [int(one) for one in wanted]


def test_digests_of_many_and_of_long_runs() -> None:
    count, long = (50, 1 << 18) if INTERPRETED else (20_000, 64 << 20)
    buffers = Buffers(long + 4096)
    nbytes = np.r_[np.full(count, 1024), long].astype(np.int64)
    offsets = np.r_[np.random.default_rng(6).integers(0, long // 8, count) * 8 % (long - 1024), 8].astype(np.int64)
    wanted = mix64_runs([buffers.content[at : at + size] for at, size in zip(offsets, nbytes, strict=True)])
    assert digests(buffers, offsets, nbytes) == [int(one) for one in wanted]
    none = np.zeros(0, np.int64)
    assert digests(buffers, none, none) == []


def test_a_single_bit_and_blocks_that_change_places_change_the_digest() -> None:
    buffers = Buffers(1 << 16)
    whole, zero = np.array([1 << 16], np.int64), np.zeros(1, np.int64)
    seen = set(digests(buffers, zero, whole))
    rng = np.random.default_rng(7)
    tries = 5 if INTERPRETED else 200
    for _ in range(tries):
        at, bit = int(rng.integers(0, 1 << 16)), int(rng.integers(0, 8))
        buffers.source[at] ^= 1 << bit
        if not INTERPRETED:
            torch.cuda.synchronize()
        seen.update(digests(buffers, zero, whole))
        buffers.source[at] ^= 1 << bit
    halves = torch.cat([buffers.source[1 << 15 :], buffers.source[: 1 << 15]])
    buffers.source.copy_(halves)
    if not INTERPRETED:
        torch.cuda.synchronize()
    seen.update(digests(buffers, zero, whole))
    assert len(seen) == tries + 2
