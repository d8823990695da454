"""Which KV heads a rank takes from which ranks of its peer when their tensor-parallel sizes differ. Pure arithmetic.

vLLM gives rank r of t the heads from r * heads // t on, heads // t of them, or one, shared with its neighbours, where
there are more ranks than heads (model_executor/layers/linear.py, QKVParallelLinear). Latent attention (MLA) has one
head, which every rank holds. A block of one layer on one rank is heads x tokens x bytes of one token and head, with K
and V of a head together (v1/kv_cache_interface.py); "HND" keeps a head's tokens together, "NHD" a token's heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from vllm_fleet.core.errors import BadRequest
from vllm_fleet.fabric.plan import Slices


@dataclass(frozen=True)
class HeadLayout:
    """How one instance keeps the KV of a layer."""

    heads: int
    """KV heads of the model; 1 for latent attention."""
    ranks: int
    """Tensor-parallel size."""
    block_tokens: int
    token_bytes: int
    """Bytes of one token of one head: K and V."""
    order: Literal["HND", "NHD"] = "HND"

    def __post_init__(self) -> None:
        """Raises BadRequest for sizes that vLLM does not allow."""
        if min(self.heads, self.ranks, self.block_tokens, self.token_bytes) < 1:
            raise BadRequest("heads, ranks, tokens of a block and bytes of a token must be at least 1")
        if self.heads % self.ranks and self.ranks % self.heads:
            raise BadRequest(
                f"{self.heads} KV heads cannot be shared by {self.ranks} ranks: one number must divide the other"
            )

    @property
    def heads_per_rank(self) -> int:
        """Heads that each rank holds."""
        return max(1, self.heads // self.ranks)

    @property
    def replicas(self) -> int:
        """Ranks that hold the same head."""
        return max(1, self.ranks // self.heads)

    @property
    def block_bytes(self) -> int:
        """Bytes of one rank's block of one layer."""
        return self.heads_per_rank * self.block_tokens * self.token_bytes

    def first_head(self, rank: int) -> int:
        """The first head that a rank holds."""
        return rank * self.heads // self.ranks


@dataclass(frozen=True)
class Share:
    """Heads that one of our ranks takes from one of the peer's: ``heads`` of them, counted inside each rank."""

    peer_rank: int
    first_theirs: int
    first_ours: int
    heads: int


def check_fit(ours: HeadLayout, theirs: HeadLayout) -> None:
    """BadRequest, naming both values, where blocks of the two sides cannot be cut into each other."""
    for what, own, other, remedy in (
        (
            "tokens in a block",
            ours.block_tokens,
            theirs.block_tokens,
            "start both instances with the same --block-size",
        ),
        ("KV heads", ours.heads, theirs.heads, "both instances must serve the same model"),
        ("bytes of a token and head", ours.token_bytes, theirs.token_bytes, "use the same --kv-cache-dtype"),
        ("order of a block", ours.order, theirs.order, "set the same VLLM_KV_CACHE_LAYOUT"),
    ):
        if own != other:
            raise BadRequest(f"{what}: {own} here, {other} there; {remedy}")


def shares(ours: HeadLayout, rank: int, theirs: HeadLayout) -> tuple[Share, ...]:
    """What ``rank`` of ours takes from which ranks of theirs; together exactly the heads that it holds.

    Where several of their ranks hold a head, ours are spread over them.

    Raises:
        BadRequest: the two sides do not fit, or there is no such rank.
    """
    check_fit(ours, theirs)
    if not 0 <= rank < ours.ranks:
        raise BadRequest(f"there is no rank {rank} of {ours.ranks}")
    head, end = ours.first_head(rank), ours.first_head(rank) + ours.heads_per_rank
    own_first, found = head, []
    while head < end:
        peer = (
            head * theirs.ranks // theirs.heads + rank % theirs.replicas
            if theirs.ranks >= theirs.heads
            else head // theirs.heads_per_rank
        )
        first = theirs.first_head(peer)
        count = min(end, first + theirs.heads_per_rank) - head
        found.append(Share(peer, head - first, head - own_first, count))
        head += count
    return tuple(found)


def slices(layout: HeadLayout, theirs: HeadLayout, share: Share) -> Slices:
    """The bytes of each block that a share copies, from their block into ours; ours has the given layout."""
    token = layout.token_bytes
    if layout.order == "HND":
        head = layout.block_tokens * token
        source, target = np.array([share.first_theirs]), np.array([share.first_ours])
        return Slices(source * head, target * head, np.array([share.heads * head]))
    tokens = np.arange(layout.block_tokens, dtype=np.int64)
    return Slices(
        (tokens * theirs.heads_per_rank + share.first_theirs) * token,
        (tokens * layout.heads_per_rank + share.first_ours) * token,
        np.full(layout.block_tokens, share.heads * token, np.int64),
    )
