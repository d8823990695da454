"""A peer of the conformance suite whose memory is on the first CUDA device that CUDA_VISIBLE_DEVICES leaves it.

python -m tests.gpu.first_device ... SETUP_JSON
"""

from __future__ import annotations

import sys

from tests.contract import cuda_pool, fabric_peer
from tests.contract.pools import Memory


def make_memory(blocks: int, block_bytes: int, *, cuda: int | None) -> Memory:
    return cuda_pool.make(blocks, block_bytes, 0)


if __name__ == "__main__":
    setattr(fabric_peer, "make_memory", make_memory)  # noqa: B010 - mypy knows it as an import of that module
    sys.argv = [sys.argv[0], sys.argv[-1]]
    fabric_peer.main()
