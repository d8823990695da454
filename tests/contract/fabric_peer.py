"""The owner's side of a fabric test, as a process of its own: registers memory, prints its handle, serves until killed.

python -m tests.contract.fabric_peer TRANSPORT BLOCKS BLOCK_BYTES SEED [TOKEN_HEX] [PORT]
"""

from __future__ import annotations

import base64
import sys

import msgspec
import numpy as np

from vllm_fleet.fabric import transports
from vllm_fleet.fabric.contract import KVPool, Region
from vllm_fleet.fabric.endpoint import Endpoint
from vllm_fleet.net import sockets
from vllm_fleet.net.channel import Credentials

REGIONS = 2


def make_pool(blocks: int, block_bytes: int, seed: int | None) -> tuple[KVPool, list[np.ndarray]]:
    """A pool of REGIONS regions, random bytes or (seed None) zeros; with its arrays of shape [blocks, block_bytes]."""
    arrays = []
    for region in range(REGIONS):
        if seed is None:
            arrays.append(np.zeros((blocks, block_bytes), np.uint8))
        else:
            rng = np.random.default_rng(seed + region)
            arrays.append(rng.integers(0, 256, (blocks, block_bytes), np.uint8))
    regions = tuple(Region(int(a.ctypes.data), a.nbytes, block_bytes, block_bytes, blocks) for a in arrays)
    return KVPool(regions, owner=arrays), arrays


def main() -> None:
    name, blocks, block_bytes, seed = sys.argv[1], *map(int, sys.argv[2:5])
    token = bytes.fromhex(sys.argv[5]) if len(sys.argv) > 5 else bytes(32)
    port = int(sys.argv[6]) if len(sys.argv) > 6 else 0
    endpoint = Endpoint(sockets.listen("127.0.0.1", port, setting="test"), Credentials("test", token))
    transport = transports.load(name)(endpoint)
    pool, _ = make_pool(blocks, block_bytes, seed)
    handle = transport.register(pool)
    endpoint.start()
    print(base64.b64encode(msgspec.msgpack.encode(handle)).decode(), endpoint.port, flush=True)
    sys.stdin.read()
    transport.close()
    endpoint.close()


if __name__ == "__main__":
    main()
