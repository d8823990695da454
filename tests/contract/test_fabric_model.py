"""Any plan without overlap in its target moves what a NumPy model of it moves."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.contract.cases import CASES
from tests.contract.harness import Bench, same
from tests.contract.pools import REGIONS, pattern
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.fabric.plan import BlockCopyPlan

pytestmark = pytest.mark.timeout(30)
UNITS = 256  # a region has so many units of what a transport can address


@st.composite
def plans(draw: st.DrawFn) -> list[tuple[int, int, int, int]]:
    """Runs of units: (region, source, target, length), targets cut from the region at random places, shuffled."""
    runs: list[tuple[int, int, int, int]] = []
    for region in range(REGIONS):
        cuts = sorted({0, UNITS, *draw(st.lists(st.integers(1, UNITS - 1), max_size=12))})
        for start, stop in itertools.pairwise(cuts):
            if draw(st.booleans()):
                runs.append((region, draw(st.integers(0, UNITS - (stop - start))), start, stop - start))
    return draw(st.permutations(runs))


@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
def test_plans_move_what_the_model_moves(bench: Bench, write: bool) -> None:
    unit = CASES[bench.case.name].run_bytes
    peer, reader = bench.start(blocks=UNITS, block_bytes=unit)
    peer.ask("allow", read=True, write=True)
    link = reader.connect(peer)
    own = pattern(UNITS, unit, seed=9)

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(plans())
    def run(runs: list[tuple[int, int, int, int]]) -> None:
        reader.memory.fill(own)
        source, target = (own, peer.content()) if write else (peer.content(), own)
        wanted = [array.copy() for array in target]
        for region, start, to, length in runs:
            wanted[region][to : to + length] = source[region][start : start + length]
        table = np.array(runs, np.int64).reshape(-1, 4) * np.array([1, unit, unit, unit], np.int64)
        regions, sources, targets, sizes = (np.ascontiguousarray(table[:, column]) for column in range(4))
        plan = BlockCopyPlan("grant", regions, sources, targets, sizes)
        transfer = link.write(plan) if write else link.read(plan)
        transfer.wait(Deadline.after(10, "test"))
        assert same(peer.content() if write else reader.memory.read_back(), wanted)

    run()
