"""A library used directly, in a process group of its own that runs only during its turn.

Threads of the libraries spin when they have nothing to do: beside them nobody else's figures would be worth much. The
reader's process reads lines from standard input: ``prepare NBYTES TOTAL SEED`` and ``copy``, and answers each with a
line: ``ok``, or the seconds of one read.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

import numpy as np

from vllm_fleet.bench import raw
from vllm_fleet.bench.blocks import BLOCK_BYTES, REGIONS, blocks_in_region, scattered
from vllm_fleet.core.errors import PeerGone

LIBRARIES = ("nixl", "nixl-tcp", "mooncake")
SETTLE_S = 0.01
WARM_RUNS = 32


class RawRunner:
    """The process group, seen from outside."""

    def __init__(self, library: str, nbytes: int) -> None:
        """Raises PeerGone when the library cannot be used; its reason is on standard error."""
        self._library = library
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vllm_fleet.bench.raw_runner", library, str(nbytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            self._hear()
        except BaseException:
            self.close()
            raise
        os.killpg(self._process.pid, signal.SIGSTOP)

    def turn(self, words: str) -> str:
        """Let it run until it has answered."""
        os.killpg(self._process.pid, signal.SIGCONT)
        time.sleep(SETTLE_S)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(words + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise PeerGone(f"{self._library}: its process has ended; the reason is on standard error") from error
        answer = self._hear()
        os.killpg(self._process.pid, signal.SIGSTOP)
        return answer

    def close(self) -> None:
        """End the group. Safe to call twice."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _hear(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PeerGone(f"{self._library}: its process has ended; the reason is on standard error")
        return line.strip()


def make(library: str, nbytes: int) -> raw.Raw:
    """One of LIBRARIES over memory of ``nbytes`` bytes, on loopback."""
    if library == "mooncake":
        return raw.RawMooncake(nbytes)
    options = {"NET_DEVICES": "lo"}
    return raw.RawNixl(nbytes, {"TLS": "tcp", **options} if library == "nixl-tcp" else options)


def main() -> None:
    """The reader's process."""
    library, held = sys.argv[1], int(sys.argv[2])
    used = make(library, held)
    sources = targets = sizes = np.zeros(0, np.int64)
    first = (np.arange(REGIONS) * blocks_in_region(held))[:, None]
    with contextlib.closing(used):
        print("ok", flush=True)
        for line in sys.stdin:
            words = line.split()
            if words[0] == "prepare":
                source, target = scattered(*map(int, words[1:]))
                # its pool may be smaller than ours: as many blocks at other places, in the same disorder
                sources = ((first + np.argsort(source)[None, :]) * BLOCK_BYTES).reshape(-1)
                targets = ((first + np.argsort(target)[None, :]) * BLOCK_BYTES).reshape(-1)
                sizes = np.full(len(sources), BLOCK_BYTES, np.int64)
                used.read(sources, targets, sizes)
                print("ok", flush=True)
                continue
            used.read(sources[:WARM_RUNS], targets[:WARM_RUNS], sizes[:WARM_RUNS])
            began = time.perf_counter()
            used.read(sources, targets, sizes)
            print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
