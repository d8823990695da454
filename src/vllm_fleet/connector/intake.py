"""One load from one prefill worker, as it comes in: what can be copied now, and whether that was all. Pure."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm_fleet.fabric.contract import Transfer
from vllm_fleet.fabric.plan import BlockCopyPlan, Slices


@dataclass(frozen=True)
class PeerLoad:
    """KV that one of our workers takes from one of theirs for one request."""

    request: str
    transfer: str
    engine: str
    prompt: bytes
    tokens: int
    block_tokens: int
    blocks: tuple[int, ...]
    """Ours; they take the peer's blocks from index ``skip`` on."""
    skip: int
    streamed: bool
    reader: int = 0
    readers: int = 1
    """How many of our workers read from that peer, and which of them this is."""
    slices: Slices | None = None
    """What of each block, where the sides' tensor-parallel sizes differ; None: all of it."""


class Job:
    """A load that was asked for; its end is reported once."""

    def __init__(self, load: PeerLoad) -> None:
        self.load = load
        self.cancelled = threading.Event()
        self.running: Transfer | None = None

    def cancel(self) -> None:
        """Abandon it; what runs is told to stop."""
        self.cancelled.set()
        running = self.running
        if running is not None:
            running.cancel()


@dataclass(frozen=True)
class Ended:
    """How a load ended: ``error`` is None when every byte arrived and was held all the time."""

    request: str
    blocks: tuple[int, ...]
    error: str | None
    reason: str
    peer: str = ""
    transport: str = "none"
    nbytes: int = 0
    copies: int = 0
    copy_s: float = 0.0
    """Time spent copying."""
    wait_s: float = 0.0
    """From the load's start until all its KV was ready to be copied."""
    whole_s: float = 0.0
    tokens: int = 0
    """Of the blocks copied, the last one perhaps in part."""
    job: Job | None = None
    """Which one it was."""


@dataclass
class Intake:
    """A load under way."""

    job: Job
    began: float
    deadline: float
    """When it is given up unless all KV is ready."""
    theirs: list[int] = field(default_factory=list)
    """The peer's blocks of the prompt, as far as known."""
    ready: int = 0
    copied: int = 0
    """Of our blocks, how many have been copied."""
    complete_at: float | None = None
    prepared: tuple[int, int, BlockCopyPlan] | None = None
    """A plan made beforehand, and from which of our blocks to which it copies."""
    nbytes: int = 0
    copies: int = 0
    copy_s: float = 0.0

    def learn(self, first: int, blocks: Sequence[int], ready: int, now: float) -> None:
        """The peer's blocks from index ``first`` on, and how many tokens are ready.

        Raises:
            ValueError: blocks before those were not told.
        """
        if first != len(self.theirs):
            raise ValueError(f"blocks from {first} on, when {len(self.theirs)} are known")
        self.theirs.extend(blocks)
        self.ready = max(self.ready, ready)
        if self.complete_at is None and self._ready_blocks() >= len(self.job.load.blocks):
            self.complete_at = now

    def next_blocks(self) -> tuple[list[int], tuple[int, ...]]:
        """Their blocks and ours to copy now; empty while nothing new is ready."""
        load, stop = self.job.load, self._ready_blocks()
        return self.theirs[load.skip + self.copied : load.skip + stop], load.blocks[self.copied : stop]

    def upcoming_blocks(self) -> tuple[list[int], tuple[int, ...]]:
        """Their blocks and ours that are known but not ready, when nothing is: what is copied next, most likely."""
        load, known = self.job.load, min(len(self.theirs), len(self.job.load.blocks) + self.job.load.skip)
        if self._ready_blocks() > self.copied:
            return [], ()
        return self.theirs[load.skip + self.copied : known], load.blocks[self.copied : max(0, known - load.skip)]

    @property
    def done(self) -> bool:
        """Whether every block has been copied."""
        return self.copied == len(self.job.load.blocks)

    def _ready_blocks(self) -> int:
        """How many of our blocks have their KV ready at the peer: whole ones, and the last when the prompt is."""
        load = self.job.load
        theirs = -(-load.tokens // load.block_tokens) if self.ready >= load.tokens else self.ready // load.block_tokens
        return max(0, min(theirs, len(self.theirs)) - load.skip) if theirs > load.skip else 0
