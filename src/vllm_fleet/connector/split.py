"""How a load is shared out where the two instances have different tensor-parallel sizes. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vllm_fleet.connector.intake import PeerLoad
from vllm_fleet.connector.jobs import LoadJob
from vllm_fleet.core.errors import BadRequest
from vllm_fleet.fabric.heads import HeadLayout, shares, slices
from vllm_fleet.fabric.plan import BlockCopyPlan, BlockShape, plan_blocks, plan_slices
from vllm_fleet.wire.ticket import WorkerAddress


@dataclass(frozen=True)
class Ranks:
    """An instance's tensor-parallel size, and what its KV blocks are made of."""

    ranks: int
    heads: int
    """KV heads of the whole model; 1 for latent attention."""
    block_tokens: int

    def layout(self, ranks: int, token_bytes: int = 1) -> HeadLayout:
        """The blocks of an instance of ``ranks`` ranks with this model."""
        return HeadLayout(self.heads, ranks, self.block_tokens, token_bytes)


def split_load(job: LoadJob, own: Ranks, rank: int, block_bytes: set[int]) -> list[tuple[WorkerAddress, PeerLoad]]:
    """The parts of a load that one of our ranks takes, each from one of their ranks.

    Args:
        block_bytes: the sizes that our blocks have, over all layers.

    Raises:
        BadRequest: the two sides' heads cannot be cut into each other.
    """
    theirs = len(job.workers)
    if theirs == own.ranks:
        return [(job.workers[rank], _part(job, own))]
    token_bytes = _token_bytes(own, block_bytes, theirs)
    ours, peers = own.layout(own.ranks, token_bytes), own.layout(theirs, token_bytes)
    parts = []
    for share in shares(ours, rank, peers):
        readers = [r for r in range(own.ranks) if any(s.peer_rank == share.peer_rank for s in shares(ours, r, peers))]
        whole = share.heads == ours.heads_per_rank == peers.heads_per_rank
        part = replace(
            _part(job, own),
            reader=readers.index(rank),
            readers=len(readers),
            slices=None if whole else slices(ours, peers, share),
        )
        parts.append((job.workers[share.peer_rank], part))
    return parts


def plan_part(
    load: PeerLoad,
    source_shapes: Sequence[BlockShape],
    target_shapes: Sequence[BlockShape],
    theirs: Sequence[int],
    ours: Sequence[int],
) -> BlockCopyPlan:
    """The plan that copies some of a part's blocks."""
    if load.slices is None:
        return plan_blocks(target_shapes, theirs, ours, load.transfer)
    return plan_slices(source_shapes, target_shapes, load.slices, theirs, ours, load.transfer)


def unread_ranks(own: Ranks, theirs: int) -> list[int]:
    """Their ranks whose blocks none of ours reads, since others hold the same heads."""
    if theirs == own.ranks:
        return []
    ours, peers = own.layout(own.ranks), own.layout(theirs)
    read = {share.peer_rank for rank in range(own.ranks) for share in shares(ours, rank, peers)}
    return [rank for rank in range(theirs) if rank not in read]


def _part(job: LoadJob, own: Ranks) -> PeerLoad:
    """A load as one part that takes whole blocks."""
    return PeerLoad(
        job.request,
        job.transfer,
        job.engine,
        job.prompt,
        job.tokens,
        own.block_tokens,
        job.blocks,
        job.skip,
        job.streamed,
    )


def _token_bytes(own: Ranks, block_bytes: set[int], theirs: int) -> int:
    """Bytes of one token of one head; BadRequest where layers differ."""
    cells = own.layout(own.ranks).heads_per_rank * own.block_tokens
    if len(block_bytes) != 1 or min(block_bytes) % cells:
        raise BadRequest(
            f"prefill has {theirs} tensor-parallel ranks and this instance {own.ranks}, and the model's layers keep KV "
            f"of different sizes ({sorted(block_bytes)} bytes a block): use the same size on both sides"
        )
    return min(block_bytes) // cells
