"""The Triton kernels themselves. Host side: kernels.py. Imports triton, so only kernels.py imports this module.

Each program works on runs ``program, program + programs, ...`` of a table of int64 rows, four columns wide; it fetches
its next row before it works on the present one, so that a table in pinned host memory costs no time after the first
row. Addresses and tables come as plain integers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _copy_rows(table, count, TILE: tl.constexpr, BYTES: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    rows = table.to(tl.int64).to(tl.pointer_type(tl.int64))
    index = tl.program_id(0)
    step = tl.num_programs(0)
    present = index < count
    source = tl.load(rows + index.to(tl.int64) * 4, mask=present, other=0)
    target = tl.load(rows + index.to(tl.int64) * 4 + 1, mask=present, other=0)
    nbytes = tl.load(rows + index.to(tl.int64) * 4 + 2, mask=present, other=0)
    lanes = tl.arange(0, TILE // 8)
    while index < count:
        index += step
        more = index < count
        next_source = tl.load(rows + index.to(tl.int64) * 4, mask=more, other=0)
        next_target = tl.load(rows + index.to(tl.int64) * 4 + 1, mask=more, other=0)
        next_nbytes = tl.load(rows + index.to(tl.int64) * 4 + 2, mask=more, other=0)
        moved = tl.where(((source | target) & 15) == 0, nbytes & -16, 0)  # bytes of the 16-byte path
        source_words = source.to(tl.pointer_type(tl.int64))
        target_words = target.to(tl.pointer_type(tl.int64))
        whole = moved // TILE * (TILE // 8)
        for start in range(0, whole, TILE // 8):
            words = tl.load(tl.multiple_of(source_words + start + lanes, 16))
            tl.store(tl.multiple_of(target_words + start + lanes, 16), words)
        rest = moved // 16 * 2 - whole
        if rest > 0:
            words = tl.load(tl.multiple_of(source_words + whole + lanes, 16), mask=lanes < rest)
            tl.store(tl.multiple_of(target_words + whole + lanes, 16), words, mask=lanes < rest)
        if moved < nbytes:
            source_bytes = source.to(tl.pointer_type(tl.int8))
            target_bytes = target.to(tl.pointer_type(tl.int8))
            for start in range(moved, nbytes, BYTES):
                within = start + tl.arange(0, BYTES)
                some = tl.load(source_bytes + within, mask=within < nbytes)
                tl.store(target_bytes + within, some, mask=within < nbytes)
        source = next_source
        target = next_target
        nbytes = next_nbytes


@triton.jit(do_not_specialize=["table", "count"])
def copy_kernel(table, count, TILE: tl.constexpr, BYTES: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Copy runs: rows of (source, target, bytes, unused). TILE: bytes in flight; BYTES: of the byte path, per step."""
    _copy_rows(table, count, TILE, BYTES)


@triton.jit(do_not_specialize=["table", "count", "arrived", "nonce", "seen"])
def read_kernel(  # type: ignore[no-untyped-def]
    table,
    count,
    arrived,
    nonce,
    seen,
    TILE: tl.constexpr,  # noqa: N803
    BYTES: tl.constexpr,  # noqa: N803
):
    """As copy_kernel; then, unless ``seen`` is 0, the last program to end copies four words from ``nonce`` to ``seen``.

    ``arrived`` is a counter in device memory, 0 before and after; ``seen`` is in pinned host memory. The words are read
    when every byte of every program has been read and written: a thread's copies come before the barrier, that before
    its program's increment, that (release) before the last one (acquire), that before the read, which is volatile: in
    PTX's memory model a relaxed read of system scope, never from L1. And they are written only when the copied bytes
    are visible to the whole system: the counter is set back with a release of system scope first. (Not by an atomic on
    host memory, which not every PCIe path can carry out.)
    """
    _copy_rows(table, count, TILE, BYTES)
    if seen != 0:
        counter = arrived.to(tl.int64).to(tl.pointer_type(tl.int32))
        words = tl.arange(0, 4)
        tl.debug_barrier()
        before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        if before == tl.num_programs(0) - 1:
            found = tl.load(nonce.to(tl.int64).to(tl.pointer_type(tl.int64)) + words, volatile=True)
            tl.debug_barrier()
            tl.atomic_xchg(counter, 0, sem="acq_rel", scope="sys")
            tl.debug_barrier()
            tl.store(seen.to(tl.int64).to(tl.pointer_type(tl.int64)) + words, found)


@triton.jit
def _avalanche(words, FIRST: tl.constexpr, SECOND: tl.constexpr, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    words = (words ^ (words >> SHIFT)) * FIRST
    words = (words ^ (words >> SHIFT)) * SECOND
    return words ^ (words >> SHIFT)


@triton.jit(do_not_specialize=["table", "sums", "count"])
def digest_kernel(  # type: ignore[no-untyped-def]
    table,
    sums,
    count,
    POSITION: tl.constexpr,  # noqa: N803
    FIRST: tl.constexpr,  # noqa: N803
    SECOND: tl.constexpr,  # noqa: N803
    SHIFT: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
):
    """Add parts of runs to their sums (fabric/digest.py): rows of (address, bytes, first word's position, run)."""
    rows = table.to(tl.int64).to(tl.pointer_type(tl.int64))
    index = tl.program_id(0)
    step = tl.num_programs(0)
    lanes = tl.arange(0, TILE)
    while index < count:
        row = rows + index.to(tl.int64) * 4
        address = tl.load(row)
        nbytes = tl.load(row + 1)
        first = tl.load(row + 2)
        run = tl.load(row + 3)
        whole = nbytes // 8
        total = tl.zeros([TILE], tl.uint64)
        octets = address.to(tl.pointer_type(tl.uint8))
        if address & 7 == 0:
            words = address.to(tl.pointer_type(tl.uint64))
            for start in range(0, whole, TILE):
                within = start + lanes
                word = tl.load(words + within, mask=within < whole, other=0)
                word = word ^ ((first + within + 1).to(tl.uint64) * POSITION)
                total += tl.where(within < whole, _avalanche(word, FIRST, SECOND, SHIFT), 0)
        else:
            for start in range(0, whole, TILE):
                within = start + lanes
                word = tl.zeros([TILE], tl.uint64)
                for octet in tl.static_range(8):
                    one = tl.load(octets + within * 8 + octet, mask=within < whole, other=0)
                    word = word | (one.to(tl.uint64) << (8 * octet))
                word = word ^ ((first + within + 1).to(tl.uint64) * POSITION)
                total += tl.where(within < whole, _avalanche(word, FIRST, SECOND, SHIFT), 0)
        summed = tl.sum(total, 0)
        if whole * 8 < nbytes:
            eight = tl.arange(0, 8)
            some = tl.load(octets + whole * 8 + eight, mask=whole * 8 + eight < nbytes, other=0).to(tl.uint64)
            word = tl.sum(some << (eight * 8).to(tl.uint64), 0)
            word = word ^ ((first + whole + 1).to(tl.uint64) * POSITION)
            summed += _avalanche(word, FIRST, SECOND, SHIFT)
        tl.atomic_add(sums.to(tl.int64).to(tl.pointer_type(tl.uint64)) + run, summed, sem="relaxed")
        index += step
