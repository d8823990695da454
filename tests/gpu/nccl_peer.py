"""The owner's side of the nccl tests, as a process of its own: a pool on one GPU, served until stdin ends.

python -m tests.gpu.nccl_peer DEVICE BLOCKS BLOCK_BYTES SEED TOKEN_HEX PORT

Prints its handle and port. Answers each line on stdin: "digest" with a SHA-256 of the pool, "register" with
a new handle after registering the pool anew, "sessions" with the number of communicators open.
"""

from __future__ import annotations

import base64
import hashlib
import sys
from typing import Any

import msgspec
import torch

from vllm_fleet.fabric.contract import KVPool, Region
from vllm_fleet.fabric.endpoint import Endpoint
from vllm_fleet.fabric.transports.nccl import NcclTransport
from vllm_fleet.net import sockets
from vllm_fleet.net.channel import Credentials
from vllm_fleet.wire.fabric import PoolHandle

REGIONS = 2


def make_pool(device: int, blocks: int, block_bytes: int, seed: int | None) -> tuple[KVPool, list[Any]]:
    """A pool of REGIONS regions on a GPU, random or (None) zeros; with its tensors of shape [blocks, block_bytes]."""
    tensors: list[Any] = []
    for region in range(REGIONS):
        shape = (blocks, block_bytes)
        if seed is None:
            content = torch.zeros(shape, dtype=torch.uint8)
        else:
            content = torch.randint(
                0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed + region)
            )
        tensors.append(content.to(torch.device("cuda", device)))
    torch.cuda.synchronize(device)
    regions = tuple(Region(t.data_ptr(), t.numel(), block_bytes, block_bytes, blocks) for t in tensors)
    return KVPool(regions, owner=tensors, cuda=device), tensors


def digest(tensors: list[Any]) -> str:
    """SHA-256 of all bytes."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.cpu().numpy().tobytes())
    return total.hexdigest()


def encode(handle: PoolHandle) -> str:
    return base64.b64encode(msgspec.msgpack.encode(handle)).decode()


def main() -> None:
    device, blocks, block_bytes, seed = map(int, sys.argv[1:5])
    endpoint = Endpoint(
        sockets.listen("127.0.0.1", int(sys.argv[6]), setting="test"), Credentials("test", bytes.fromhex(sys.argv[5]))
    )
    endpoint.allow_write = lambda grant, regions, offsets, nbytes: grant == "grant"
    transport = NcclTransport(endpoint)
    pool, tensors = make_pool(device, blocks, block_bytes, seed)
    handle = transport.register(pool)
    endpoint.start()
    print(encode(handle), endpoint.port, flush=True)
    for line in sys.stdin:
        if line.strip() == "digest":
            print(digest(tensors), flush=True)
        elif line.strip() == "register":
            print(encode(transport.register(pool)), flush=True)
        else:
            assert transport._owner is not None
            print(transport._owner.sessions, flush=True)
    transport.close()
    endpoint.close()


if __name__ == "__main__":
    main()
