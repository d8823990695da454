"""Direct reads within one process, on a GPU or, under TRITON_INTERPRET=1, on CPU memory: no peer, no IPC mapping."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.gpu import host_driver
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.fabric.contract import KVPool, Region, TransferCancelledError, TransferError
from vllm_fleet.fabric.plan import BlockCopyPlan, BlockShape, plan_blocks
from vllm_fleet.wire.fabric import PoolHandle

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

triton = pytest.importorskip("triton", reason="needs Triton, which comes with CUDA builds of torch")
torch = pytest.importorskip("torch")
INTERPRETED = bool(triton.knobs.runtime.interpret)
if not INTERPRETED and not list(Path("/dev").glob("nvidia[0-9]*")):
    pytest.skip("needs a CUDA device", allow_module_level=True)

from vllm_fleet.fabric.transports.cuda import driver, kernels, reads, slots  # noqa: E402 - only where Triton is
from vllm_fleet.fabric.transports.cuda.direct import DirectTransfer  # noqa: E402
from vllm_fleet.fabric.transports.cuda.launch import Kernel, programs  # noqa: E402

DEVICE = 0
REGIONS, BLOCKS, BLOCK = 3, 64, 512
SHAPES = [BlockShape(BLOCK, BLOCK, BLOCKS)] * REGIONS


def soon() -> Deadline:
    return Deadline.after(20, "test")


class Bench:
    """Both sides in one memory: a peer's regions and nonce, this side's regions, and the reads between them."""

    def __init__(self, block: int = BLOCK) -> None:
        self.block = block
        self.where = "cpu" if INTERPRETED else f"cuda:{DEVICE}"
        self.content = np.random.default_rng(3).integers(1, 256, (REGIONS, BLOCKS, block), np.uint8)
        self.source = torch.from_numpy(self.content).to(self.where).clone()
        self.target = torch.zeros_like(self.source)
        self.nonce_bytes = np.random.default_rng(4).bytes(32)
        self.nonce = torch.frombuffer(bytearray(self.nonce_bytes), dtype=torch.uint8).to(self.where).clone()
        self.settle()
        theirs = [int(region.data_ptr()) for region in self.source]
        ours = [int(region.data_ptr()) for region in self.target]
        size = BLOCKS * block
        pool = KVPool(tuple(Region(at, size, block, block, BLOCKS) for at in ours), cuda=DEVICE)
        peer = PoolHandle("cuda_ipc", "pool", (size,) * REGIONS, b"")
        mapping = SimpleNamespace(regions=np.array(theirs, np.int64), nonce=int(self.nonce.data_ptr()))
        self.stream = driver.Stream(DEVICE)
        self.reads = reads.DirectReads(pool, peer, mapping, self.nonce_bytes, self.stream, "the peer")  # type: ignore[arg-type]
        self.launched: list[int] = []
        """Runs of each launch."""
        start = self.reads._queue.start

        def noted(table: int, count: int, seen: int) -> None:
            self.launched.append(count)
            start(table, count, seen)

        setattr(self.reads._queue, "start", noted)  # noqa: B010 - mypy knows it as a method

    def settle(self) -> None:
        if not INTERPRETED:
            torch.cuda.synchronize(DEVICE)

    def plan(self, sources: list[int], targets: list[int]) -> BlockCopyPlan:
        shape = BlockShape(self.block, self.block, BLOCKS)
        return plan_blocks([shape] * REGIONS, sources, targets, "t")

    def read(self, plan: BlockCopyPlan) -> None:
        transfer = self.reads.start(plan)
        assert transfer is not None
        transfer.wait(soon())
        assert transfer.done()

    def check(self, sources: list[int], targets: list[int]) -> None:
        wanted = np.zeros_like(self.content)
        wanted[:, targets] = self.content[:, sources]
        assert (self.target.cpu().numpy() == wanted).all()
        self.target.zero_()
        self.settle()

    def close(self) -> None:
        self.settle()
        self.stream.synchronize()
        self.reads.close()
        self.stream.close()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    memory = host_driver.install(monkeypatch) if INTERPRETED else None
    made = Bench()
    yield made
    made.close()
    assert memory is None or not memory.kept, "device memory was not freed"


FROM, TO = [5, 2, 40, 63, 11], [0, 9, 33, 1, 62]


def test_the_probe_reads_the_nonce_as_blocks_are_read(bench: Bench) -> None:
    bench.reads.probe()
    bench.reads.probe()


@pytest.mark.parametrize("last", [0, 20, 39])
def test_the_nonce_is_read_when_every_program_is_through(bench: Bench, last: int) -> None:
    """One of the runs that are copied, by any of the programs, lies over the nonce: what arrives is what it brought."""
    count, words = 40, driver.Pinned(DEVICE, 64 + 40 * slots.ROW_BYTES)
    rows = words.words[8:].reshape(count, slots.ROW_WORDS)
    source, target = int(bench.source.data_ptr()), int(bench.target.data_ptr())
    for row in range(count):
        rows[row] = (source + row * BLOCK, target + row * BLOCK, BLOCK, 0)
    rows[last, 1:3] = int(bench.nonce.data_ptr()), 32
    for _ in range(3):
        words.words[:4] = 0
        with driver.current(DEVICE):
            bench.reads._queue.start(words.address + 64, count, words.address)
        bench.stream.synchronize()
        assert words.words[:4].tobytes() == bench.content.reshape(-1, BLOCK)[last, :32].tobytes()
        bench.nonce.zero_()
        bench.settle()
    words.close()


def test_reads_one_after_the_other_see_the_end_of_each(bench: Bench) -> None:
    for turn in range(12):
        sources = [(block + turn) % BLOCKS for block in FROM]
        bench.read(bench.plan(sources, TO))
        bench.check(sources, TO)
    assert bench.launched == [len(FROM) * REGIONS] * 12


def test_a_prepared_read_is_one_launch_and_is_prepared_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "FIRST_RUNS", 4)
    plan = bench.plan(FROM, TO)
    bench.reads.prepare(plan)
    bench.reads.prepare(plan)
    bench.read(plan)
    bench.check(FROM, TO)
    assert bench.launched == [15]
    bench.read(plan)
    bench.check(FROM, TO)
    assert bench.launched == [15, 4, 11]


def test_more_runs_than_the_first_launch_takes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "FIRST_RUNS", 2)
    monkeypatch.setattr(slots, "GROWTH", 3)
    order = np.random.default_rng(5).permutation(BLOCKS)[:9].tolist()
    bench.read(bench.plan(order, order[::-1]))
    bench.check(order, order[::-1])
    assert bench.launched == [2, 6, 19]


def test_long_runs_are_shared_among_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        host_driver.install(monkeypatch)
    bench = Bench(4096)
    blocks = list(range(32))
    bench.read(bench.plan(blocks, blocks))
    bench.check(blocks, blocks)
    assert bench.launched == [3 * 32 * 4096 // kernels.TILE_BYTES]
    bench.close()


@pytest.mark.parametrize("prepared", [False, True])
def test_a_registration_that_was_withdrawn_fails_the_read(bench: Bench, prepared: bool) -> None:
    plan = bench.plan(FROM, TO)
    if prepared:
        bench.reads.prepare(plan)
    bench.nonce.zero_()
    bench.settle()
    transfer = bench.reads.start(plan)
    assert transfer is not None
    with pytest.raises(TransferError, match="withdrawn"):
        transfer.wait(soon())
    with pytest.raises(TransferError, match="withdrawn"):
        bench.reads.probe()


def test_a_nonce_that_changed_in_its_last_byte_fails_the_read(bench: Bench) -> None:
    bench.nonce[31] ^= 1
    bench.settle()
    transfer = bench.reads.start(bench.plan(FROM, TO))
    assert transfer is not None
    with pytest.raises(TransferError, match="withdrawn"):
        transfer.wait(soon())


@pytest.mark.parametrize("prepared", [False, True])
def test_a_plan_that_reaches_outside_moves_nothing(bench: Bench, prepared: bool) -> None:
    good = bench.plan(FROM, TO)
    for field, value in (("source", -BLOCK), ("target", BLOCKS * BLOCK), ("region", REGIONS), ("region", -1)):
        arrays = {name: getattr(good, name).copy() for name in ("region", "source", "target", "nbytes")}
        arrays[field][-1] = value
        bad = BlockCopyPlan("t", **arrays)
        if prepared:
            bench.reads.prepare(bad)
        transfer = bench.reads.start(bad)
        assert transfer is not None
        with pytest.raises(TransferError, match="plan"):
            transfer.wait(soon())
    assert bench.launched == []
    bench.read(good)
    bench.check(FROM, TO)


def test_as_many_at_once_as_there_are_slots(bench: Bench) -> None:
    transfers: list[DirectTransfer] = []
    for turn in range(3 * slots.SLOTS):
        transfer = bench.reads.start(bench.plan([turn], [turn]))
        if transfer is None:  # all slots are taken, none of their copies has ended yet
            transfers.pop(0).wait(soon())
            transfer = bench.reads.start(bench.plan([turn], [turn]))
        assert transfer is not None
        transfers.append(transfer)
    for transfer in transfers:
        transfer.wait(soon())
    blocks = list(range(3 * slots.SLOTS))
    bench.check(blocks, blocks)


def test_prepared_plans_leave_slots_for_others_and_the_oldest_gives_way(bench: Bench) -> None:
    plans = [bench.plan([block], [block]) for block in range(slots.PREPARED_MAX + 2)]
    for plan in plans:
        bench.reads.prepare(plan)
    held = [plan for plan in plans if bench.reads._slots.prepared(plan) is not None]
    assert held == plans[2:]
    for plan in plans:
        bench.read(plan)
    blocks = list(range(len(plans)))
    bench.check(blocks, blocks)
    bench.reads.prepare(plans[0])
    bench.reads.forget(plans[0])
    assert bench.reads._slots.prepared(plans[0]) is None


def test_long_and_empty_plans_are_left_to_the_thread(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = bench.plan(FROM, TO)
    monkeypatch.setattr(reads, "DIRECT_RUNS_MAX", len(plan) - 1)
    bench.reads.prepare(plan)
    assert bench.reads.start(plan) is None
    assert bench.reads.start(bench.plan([], [])) is None
    monkeypatch.setattr(reads, "DIRECT_RUNS_MAX", len(plan))
    assert bench.reads.start(plan) is not None


def test_a_cancelled_read_says_so_and_writes_no_more(bench: Bench) -> None:
    transfer = bench.reads.start(bench.plan(FROM, TO))
    assert transfer is not None
    transfer.cancel()
    bench.target.zero_()
    bench.settle()
    with pytest.raises(TransferCancelledError):
        transfer.done()
    bench.stream.synchronize()
    assert not bench.target.any()
    bench.read(bench.plan(FROM, TO))
    bench.check(FROM, TO)


def test_the_kernels_are_started_without_tritons_launcher() -> None:
    if INTERPRETED:
        pytest.skip("nothing is compiled in the interpreter")
    example = (kernels.ADDRESS, 1, kernels.ADDRESS, kernels.ADDRESS, kernels.ADDRESS)
    constants = (kernels.TILE_BYTES, kernels.OCTETS)
    assert Kernel(programs.read_kernel, DEVICE, example, constants, kernels.WARPS).is_direct
    assert Kernel(programs.copy_kernel, DEVICE, example[:2], constants, kernels.WARPS).is_direct
