"""How a link of the nccl transport stages: the numbers that a measurement on GPUs decides (benchmarks/gpu_nccl.py)."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_fleet.core import limits
from vllm_fleet.core.errors import BadRequest

BUFFERS_MAX = 32
PROGRAMS_MAX = 128
TABLES, TABLE_ROWS = 8, 4096
"""Tables of rows that wait for the kernels that copy them. One question fills six of them at most, ..."""
TABLES_BYTES = TABLES * TABLE_ROWS * 32
""": 1 MiB of pinned memory, and (Tuning.uploaded) as much on the device."""


@dataclass(frozen=True)
class Tuning:
    """How a link stages. Both sides use the asking side's ``chunk_bytes``, ``ctas_max`` and ``lanes``."""

    chunk_bytes: int = 15 << 20
    buffers: int = 4
    ctas_max: int = 16
    """Most multiprocessors that NCCL's kernel takes, in each lane. With other numbers on the two sides the first
    message fails (internal error, NCCL 2.28.9)."""

    lanes: int = 3
    """Communicators, used in turn, so that one's message may start while another's ends. Messages of 1 GiB moved at
    341 GB/s in three of 16 CTAs, 314 in two, 309 in two of 32 (2 x H200, docs/benchmarks/2026-11-21-gpu-nccl.json)."""

    programs: int = 64
    """Multiprocessors that gather or scatter, on this side: with 32, messages of 128 MiB moved at 258 GB/s, not 275."""

    registered: bool = False
    """Whether this side's staging is registered with NCCL (ncclCommRegister)."""

    uploaded: bool = False
    """Whether the tables of rows are copied to the device first: the kernels then read them sooner, but start later."""

    def __post_init__(self) -> None:
        if not 1 <= self.lanes <= limits.NCCL_LANES_MAX:
            raise BadRequest(f"{self.lanes} lanes: need 1 to {limits.NCCL_LANES_MAX}")
        if not 1 <= self.programs <= PROGRAMS_MAX:
            raise BadRequest(f"{self.programs} programs: need 1 to {PROGRAMS_MAX}")
        most = self.staging_bytes_max
        if not 2 <= self.buffers <= BUFFERS_MAX or self.chunk_bytes * self.buffers > most:
            raise BadRequest(
                f"{self.buffers} staging buffers of {self.chunk_bytes} bytes: need 2 to {BUFFERS_MAX}, and "
                f"{most} bytes at most"
            )

    @property
    def multiprocessors(self) -> int:
        """What a transfer takes of a GPU at most."""
        return self.programs + self.lanes * self.ctas_max

    @property
    def staging_bytes_max(self) -> int:
        """Bytes of all staging buffers together, at most."""
        return limits.NCCL_STAGING_BYTES_MAX - (TABLES_BYTES if self.uploaded else 0)
