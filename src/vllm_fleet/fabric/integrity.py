"""Checksums end to end: the reader compares what arrived with what the owner holds, whatever moved the bytes.

The owner computes them from its own memory when it is asked, over the authenticated control connection and not over the
transport; the reader from its own memory after the transfer. CPU memory: XXH3 (64 bits); CUDA memory: mix64, by a
kernel (fabric/digest.py). Both find accidents, not forgers. Modes:

- off: nothing is checked;
- sampled: 64 pieces of the first transfer on each link, so that a broken path shows at once; then pieces chosen at
  random, as often as half a percent of the time spent copying pays for;
- full: every byte.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Iterator
from typing import Literal, TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray

from vllm_fleet.core import limits, log
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import Corrupt, FleetError
from vllm_fleet.fabric.contract import KVPool, TransferError
from vllm_fleet.fabric.endpoint import Endpoint, receive_answer
from vllm_fleet.fabric.owner import Runs, check_runs, encode_runs
from vllm_fleet.fabric.plan import BlockCopyPlan
from vllm_fleet.net.channel import Channel
from vllm_fleet.wire import fabric as wire

Mode: TypeAlias = Literal["off", "sampled", "full"]
Algorithm: TypeAlias = Literal["xxh3", "mix64"]

PIECE_BYTES_MAX = 64 << 10
"""What one checksum covers at most."""

FIRST_PIECES = 64
SHARE = 0.005
"""Part of the time spent copying that sampled checks may cost."""

PRICE_S = 200e-6
"""What a check is taken to cost before one was measured."""

SAMPLE_PIECES = 4
DRAIN_S = 2.0


class ChecksumError(TransferError):
    """Bytes arrived that are not the owner's: none of this transfer may be used."""


def algorithm_of(pool: KVPool) -> Algorithm:
    """The checksum for a pool's kind of memory."""
    return "xxh3" if pool.cuda is None else "mix64"


def digests(runs: Runs) -> NDArray[np.uint64]:
    """Checksums of runs of this process's memory; shape [runs]."""
    if runs.pool.cuda is not None:
        from vllm_fleet.fabric.transports.cuda.kernels import digest_pool_runs

        return digest_pool_runs(runs.addresses, runs.nbytes, runs.pool.cuda)
    regions = [memoryview((ctypes.c_char * r.nbytes).from_address(r.address)).cast("B") for r in runs.pool.regions]
    sums = np.zeros(len(runs.nbytes), np.uint64)
    triples = zip(runs.region.tolist(), runs.offset.tolist(), runs.nbytes.tolist(), strict=True)
    for index, (region, offset, nbytes) in enumerate(triples):
        sums[index] = int(xxhash.xxh3_64_intdigest(regions[region][offset : offset + nbytes]))
    return sums


def serve(endpoint: Endpoint) -> None:
    """Let peers ask for checksums of the pools registered on an endpoint; before it starts."""

    def answer(channel: Channel, question: wire.Question) -> wire.Answer:
        assert isinstance(question, wire.Digest)
        runs = check_runs(endpoint, question.pool, question.grant, question.runs)
        if isinstance(runs, wire.Denied):
            return runs
        if question.algorithm != algorithm_of(runs.pool):
            return wire.Denied("unsupported", f"checksums here are {algorithm_of(runs.pool)}")
        return wire.Digests(digests(runs).astype("<u8").tobytes())

    endpoint.handle(wire.Digest, answer)


class Sampler:
    """How many pieces of the next transfer to check, so that checks cost at most SHARE of the copying. Pure."""

    def __init__(self) -> None:
        self.is_first = True
        """Whether the next transfer is the link's first."""
        self._credit_s = 0.0
        self._price_s = PRICE_S

    def pieces(self) -> int:
        """Pieces to check of the next transfer; 0: none."""
        if self.is_first:
            return FIRST_PIECES
        return SAMPLE_PIECES if self._credit_s >= self._price_s else 0

    def copied(self, copy_s: float, check_s: float | None) -> None:
        """A transfer took ``copy_s``, and its check, if there was one, ``check_s`` more."""
        self._credit_s += SHARE * copy_s
        if check_s is None:
            return
        if not self.is_first:  # the first one is dearer, and once per link
            self._credit_s -= check_s
            self._price_s += (check_s - self._price_s) / 4
        self.is_first = False


class Verifier:
    """The reader's half, for one link: ``with verifier.checking(...): copy``. Not for use by two threads at once."""

    def __init__(self, pool: KVPool, mode: Mode, rng: np.random.Generator) -> None:
        self._pool = pool
        self._mode = mode
        self._rng = rng
        self._sampler = Sampler()
        self.pieces = 0
        """Pieces checked so far."""
        self.copied_s = 0.0
        self.checked_s = 0.0
        """What copying took so far, and checking on top of it, without the first transfer's."""

    @contextlib.contextmanager
    def checking(self, channel: Channel, peer_pool: str, plan: BlockCopyPlan, deadline: Deadline) -> Iterator[None]:
        """Copy a plan inside; on leaving, its chosen pieces are compared.

        ``channel`` is a control connection to the owner, whose registration ``peer_pool`` is; nothing else may be asked
        on it meanwhile. The owner computes its half while the bytes are copied.

        Raises:
            ChecksumError: a piece differs. PeerGone, Corrupt: the owner did not say.
        """
        chosen = self._choose(plan)
        if chosen is None or not len(chosen):
            began = time.perf_counter()
            yield
            self._account(time.perf_counter() - began, None)
            return
        parts = list(chosen.pieces(limits.RUNS_MAX, 1 << 62))
        self._ask(channel, peer_pool, chosen, parts[0], deadline)
        began = time.perf_counter()
        try:
            yield
        except FleetError:
            _drain(channel)
            raise
        copied = time.perf_counter()
        for index, part in enumerate(parts):
            if index:
                self._ask(channel, peer_pool, chosen, part, deadline)
            self._compare(channel, chosen, part, deadline)
        self.pieces += len(chosen)
        self._account(copied - began, time.perf_counter() - copied)

    def _account(self, copy_s: float, check_s: float | None) -> None:
        if not self._sampler.is_first:
            self.copied_s += copy_s
            self.checked_s += check_s or 0.0
        self._sampler.copied(copy_s, check_s)

    def _choose(self, plan: BlockCopyPlan) -> BlockCopyPlan | None:
        if self._mode == "off" or not len(plan):
            return None
        if self._mode == "full":
            return plan.split(PIECE_BYTES_MAX)
        count = self._sampler.pieces()
        return sample(plan, count, self._rng) if count else None

    def _ask(self, channel: Channel, peer_pool: str, chosen: BlockCopyPlan, part: slice, deadline: Deadline) -> None:
        runs = encode_runs(chosen.region[part], chosen.source[part], chosen.nbytes[part])
        question = wire.Digest(chosen.grant, peer_pool, runs, algorithm_of(self._pool))
        channel.send(wire.encode(question), deadline)

    def _compare(self, channel: Channel, chosen: BlockCopyPlan, part: slice, deadline: Deadline) -> None:
        ours = digests(Runs(self._pool, chosen.region[part], chosen.target[part], chosen.nbytes[part]))
        answer = receive_answer(channel, deadline)
        if isinstance(answer, wire.Denied):
            raise TransferError(f"{channel.peer} gave no checksums: {answer.reason} {answer.detail}".rstrip())
        if not isinstance(answer, wire.Digests) or len(answer.sums) != len(ours) * wire.DIGEST_BYTES:
            raise Corrupt(f"{channel.peer} did not answer the {len(ours)} checksums asked for")
        wrong = np.flatnonzero(ours != np.frombuffer(answer.sums, "<u8"))
        if len(wrong):
            where = int(wrong[0]) + part.start
            at, region = int(chosen.target[where]), int(chosen.region[where])
            log.warn("checksum.wrong", peer=channel.peer, wrong=len(wrong), checked=len(ours))
            raise ChecksumError(
                f"{len(wrong)} of {len(ours)} checked pieces are not what {channel.peer} holds; the first: "
                f"{int(chosen.nbytes[where])} bytes at {at} in region {region}"
            )


def sample(plan: BlockCopyPlan, count: int, rng: np.random.Generator) -> BlockCopyPlan:
    """At most ``count`` pieces of at most PIECE_BYTES_MAX bytes of different runs of a plan, chosen at random."""
    chosen = np.sort(rng.choice(len(plan), min(count, len(plan)), replace=False))
    parts = -(-plan.nbytes[chosen] // PIECE_BYTES_MAX)
    skipped = rng.integers(0, parts) * PIECE_BYTES_MAX
    return BlockCopyPlan(
        plan.grant,
        plan.region[chosen],
        plan.source[chosen] + skipped,
        plan.target[chosen] + skipped,
        np.minimum(plan.nbytes[chosen] - skipped, PIECE_BYTES_MAX),
    )


def _drain(channel: Channel) -> None:
    """Take the answer that nobody needs any more, so that the next question gets its own."""
    with contextlib.suppress(FleetError):  # the connection is closed then
        receive_answer(channel, Deadline.after(DRAIN_S, "fabric.integrity.DRAIN_S"))
