"""The conversation of one nccl transfer, on the asking side: what it asks the owner, and what the owner says to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import Corrupt
from vllm_fleet.fabric.contract import TransferError
from vllm_fleet.fabric.endpoint import receive_answer
from vllm_fleet.fabric.owner import encode_runs
from vllm_fleet.fabric.plan import BlockCopyPlan, Ints
from vllm_fleet.fabric.transports.cuda.nccl_pieces import message_sizes, pieces_of
from vllm_fleet.fabric.transports.cuda.pieces import Pieces, parts
from vllm_fleet.fabric.transports.cuda.pipe import IDLE_S, IDLE_SETTING, ROW_BYTES_MAX
from vllm_fleet.fabric.transports.cuda.reads import check_plan
from vllm_fleet.net.channel import Channel
from vllm_fleet.wire import fabric as wire

PART_RUNS_MAX = 8192
PART_BYTES_MAX = 256 << 20
PART_PIECES_MAX = 32
"""Runs, bytes and whole pieces of each question of a transfer: the wire has work enough in one for the time that the
next one takes the owner (some 0.3 ms), and a shorter first one would gain less than that costs.

Each has fewer pieces than pipe.AHEAD_MAX and fits the pipe's tables: so the owner never waits for pieces of the
question it works on, and reads the next one, whatever this side has yet to enqueue.
"""
RUN_BYTES_MAX = 1 << 20  # longer runs are named in parts, since questions are cut between runs

Within = Callable[[float, str], Deadline]
"""So many seconds from now, or the transfer's own deadline if that is earlier; (seconds, setting)."""


class Memory(NamedTuple):
    """Both pools; arrays of shape [regions]."""

    addresses: Ints
    own_bytes: Ints
    peer: str
    peer_bytes: Ints
    chunk_bytes: int


class Asked(NamedTuple):
    question: bytes
    answers: list[wire.Answer]
    """What the owner says to it if all is well."""


class Questions:
    """What one transfer asks the owner, and where the bytes are on this side."""

    def __init__(self, memory: Memory, plan: BlockCopyPlan, *, write: bool) -> None:
        """Raises TransferError when the plan, which is not empty, names memory that one side does not have."""
        sizes = memory.own_bytes, memory.peer_bytes
        check_plan(plan, *(sizes if write else sizes[::-1]))
        self.given = plan
        self._memory, self._plan, self._write = memory, plan.split(RUN_BYTES_MAX), write
        most = min(PART_BYTES_MAX, PART_PIECES_MAX * memory.chunk_bytes)
        if len(self._plan) <= PART_RUNS_MAX and self._plan.total_bytes <= most:
            self.parts = [slice(0, len(self._plan))]
        else:
            self.parts = list(parts(self._plan.nbytes, PART_RUNS_MAX, [most]))
        self._made: tuple[Asked, Pieces] | None = None

    def make_first(self) -> None:
        """Make the first question and its pieces now."""
        self._made = self.ask(0), self.pieces(0)

    def ask(self, index: int) -> Asked:
        """Question number ``index``."""
        if index == 0 and self._made is not None:
            return self._made[0]
        plan, part = self._plan, self.parts[index]
        offset, nbytes = (plan.target if self._write else plan.source)[part], plan.nbytes[part]
        runs, total = encode_runs(plan.region[part], offset, nbytes), int(nbytes.sum())
        more = index + 1 < len(self.parts)
        answers: list[wire.Answer] = [wire.Writing(total) if self._write else wire.Reading(total)]
        if not more:
            answers.append(wire.Moved(plan.total_bytes))
        kind = wire.NcclWrite if self._write else wire.NcclRead
        return Asked(wire.encode(kind(plan.grant, self._memory.peer, runs, more)), answers)

    def pieces(self, index: int) -> Pieces:
        """This side's memory for question number ``index``."""
        if index == 0 and self._made is not None:
            return self._made[1]
        plan, part = self._plan, self.parts[index]
        own, nbytes = (plan.source if self._write else plan.target)[part], plan.nbytes[part]
        sizes = message_sizes(int(nbytes.sum()), self._memory.chunk_bytes)
        return pieces_of(self._memory.addresses[plan.region[part]] + own, nbytes, sizes, ROW_BYTES_MAX)


class Answers:
    """What the owner says to one transfer, in the order of ``wanted``."""

    def __init__(self, channel: Channel, within: Within, *wanted: wire.Answer) -> None:
        self._channel, self._within, self.wanted = channel, within, list(wanted)
        self.taken = 0

    def take_arrived(self) -> None:
        """Take what has arrived; does not wait. Raises RefusedError, TransferError, Corrupt or PeerGone."""
        while self._channel.has_arrived():
            answer = receive_answer(self._channel, self._within(IDLE_S, IDLE_SETTING))
            if isinstance(answer, wire.Denied):
                kind = TransferError if self.taken else RefusedError
                raise kind(f"{self._channel.peer} refused the transfer: {answer.reason} {answer.detail}".rstrip())
            if self.taken >= len(self.wanted) or answer != self.wanted[self.taken]:
                raise Corrupt(f"{self._channel.peer} answered something else than was expected next")
            self.taken += 1


class RefusedError(TransferError):
    """The owner refused a transfer of which nothing had been enqueued."""
