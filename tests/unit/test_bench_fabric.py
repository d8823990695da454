"""`vllm-fleet bench fabric`: its arithmetic and its flags."""

from __future__ import annotations

import math

import pytest

from vllm_fleet.bench.blocks import BLOCK_BYTES, REGIONS, make_blocks, scattered
from vllm_fleet.bench.fabric import Row, ratios, share, sizes_that_fit
from vllm_fleet.cli.bench import parse_cuda, parse_names, parse_size
from vllm_fleet.core.errors import BadRequest


def row(name: str, *seconds: float, nbytes: int = 10**9, cpu_s: float = 0.0) -> Row:
    return Row(name, "transport", nbytes, 0, list(seconds), cpu_s)


def test_a_row_is_its_medians() -> None:
    one = row("cma", 0.4, 0.1, 0.2, cpu_s=1.5)
    assert one.median == 0.2
    assert one.gb_s == 5.0
    assert one.p99 == 0.4
    assert one.cpu_s_per_gb == 0.5
    assert math.isnan(row("raw", 1.0, cpu_s=float("nan")).cpu_s_per_gb)
    assert row("tcp", *(i / 100 for i in range(1, 201))).p99 == 1.98


def test_ratios_are_medians_of_single_rounds() -> None:
    """The machine got slower from round to round, for both alike: the ratio of the medians would not show 2.0."""
    rows = [row("cma", 1.0, 2.0, 8.0), row("memcpy in one process", 2.0, 4.0, 16.0), row("tcp", 1.0, 1.0, 1.0)]
    assert ratios(rows) == [{"of": "cma", "to": "memcpy in one process", "nbytes": 10**9, "ratio": 2.0}]


def test_the_share_is_of_the_ceiling_of_the_same_size() -> None:
    rows = [row("cma", 0.5), row("memcpy in one process", 0.25), row("memcpy in one process", 9.0, nbytes=5)]
    assert share(rows[0], rows) == 0.5
    assert share(rows[1], rows) is None
    assert share(row("nixl", 1.0), rows) is None


def test_a_prepared_read_is_compared_with_the_ceiling_beside_the_one_that_is_not() -> None:
    rows = [row("cuda_ipc", 4.0), row("cuda_ipc, prepared", 2.0), row("contiguous peer copy", 1.0)]
    assert [(one["of"], one["ratio"]) for one in ratios(rows)] == [("cuda_ipc", 0.25), ("cuda_ipc, prepared", 0.5)]
    assert share(rows[1], rows) == 0.5


def test_flags_say_what_was_expected() -> None:
    assert parse_size("32MiB") == 32 << 20
    assert parse_size(" 4GiB ") == 4 << 30
    for wrong in ("32MB", "", "-1MiB", "16KiB", "1e3MiB"):
        with pytest.raises(BadRequest, match="expected sizes like 32MiB"):
            parse_size(wrong)
    assert parse_names("cma, tcp,", ("cma", "tcp"), "--transport") == ("cma", "tcp")
    with pytest.raises(BadRequest, match="--transport: expected some of cma, found 'smoke'"):
        parse_names("smoke", ("cma",), "--transport")
    assert parse_cuda(None) is None
    assert parse_cuda("0,3") == (0, 3)
    with pytest.raises(BadRequest, match="like 0,1, found '0'"):
        parse_cuda("0")


def test_sizes_that_do_not_fit_are_left_out() -> None:
    fitting, free = sizes_that_fit([32 << 20, 1 << 60], cuda=False, libraries=0)
    assert fitting == (32 << 20,)
    assert free > 0


def test_blocks_know_their_place_and_plans_stay_inside() -> None:
    total = REGIONS * BLOCK_BYTES * 4
    blocks = make_blocks(total, None, filled=True)
    numbers = blocks.memory[:, :8].copy().view("<u8").reshape(-1)
    assert numbers.tolist() == list(range(REGIONS * 4))
    source, target = scattered(total // 2, total, seed=1)
    assert len(source) == len(target) == len(set(source.tolist())) == 2
    assert 0 <= int(min(source.min(), target.min())) <= int(max(source.max(), target.max())) < 4
