"""launcher.gpus: who gets which GPUs, and what nvidia-smi says of them."""

from __future__ import annotations

import pytest

from vllm_fleet.core.errors import ConfigError
from vllm_fleet.launcher.gpus import Gpus, check_enough, choose, islands_of, parse_names, parse_topology

TWO_PAIRS = (frozenset("01"), frozenset("23"))


def sample(links: str, *, affinity: str = "CPU Affinity\tNUMA Affinity\tGPU NUMA ID", extra: str = "") -> str:
    """An answer of `nvidia-smi topo -m` (its header is underlined, its cells are padded): rows of ``links``."""
    rows = [row.split() for row in links.strip().splitlines()]
    names = [f"GPU{number}" for number in range(len(rows))] + ([extra] if extra else [])
    header = "\t" + "\t".join(f"\x1b[4m{name}" for name in names) + f"\t{affinity}\x1b[0m"
    body = [f"{name}\t" + "\t".join(f" {cell} " if cell == "X" else cell for cell in [*row, "PHB"][: len(names)])
            + "\t0-63\t0\t\tN/A" for name, row in zip(names, rows, strict=False)]  # fmt: skip
    legend = "\n\nLegend:\n\n  X    = Self\n  NV#  = Connection traversing a bonded set of # NVLinks\n"
    return "\n".join([header, *body]) + legend


def test_a_board_where_all_are_joined() -> None:
    text = sample("X NV18 NV18 NV18\nNV18 X NV18 NV18\nNV18 NV18 X NV18\nNV18 NV18 NV18 X")
    assert parse_topology(text) == (frozenset({0, 1, 2, 3}),)


def test_pairs_with_a_network_card_between() -> None:
    text = sample("X NV4 SYS SYS\nNV4 X SYS SYS\nSYS SYS X NV4\nSYS SYS NV4 X", extra="NIC0")
    assert parse_topology(text) == (frozenset({0, 1}), frozenset({2, 3}))


def test_a_ring_is_one_island() -> None:
    text = sample("X NV1 SYS NV1\nNV1 X NV1 SYS\nSYS NV1 X NV1\nNV1 SYS NV1 X")
    assert parse_topology(text) == (frozenset({0, 1, 2, 3}),)


@pytest.mark.parametrize(
    "text", [sample("X PHB\nPHB X"), sample("X"), "", "NVIDIA-SMI has failed\n", "\tGPU0\tGPU1\nGPU0\n", "\n\t\n"]
)
def test_no_nvlink_no_islands(text: str) -> None:
    assert parse_topology(text) == ()


def test_islands_in_the_names_of_the_visible() -> None:
    names = parse_names("0, GPU-aaaa1111-2\n1, GPU-bbbb1111-2\n2, GPU-cccc\n3, GPU-dddd\n\nno devices\n")
    islands = parse_topology(sample("X NV4 SYS SYS\nNV4 X SYS SYS\nSYS SYS X NV4\nSYS SYS NV4 X"))
    assert islands_of(tuple("0123"), names, islands) == TWO_PAIRS
    assert islands_of(("GPU-aaaa", "GPU-bbbb1111-2", "3"), names, islands) == (
        frozenset({"GPU-aaaa", "GPU-bbbb1111-2"}),
    )
    assert islands_of(("0", "2"), names, islands) == (), "what is not visible joins nobody"
    assert islands_of(("MIG-1", "MIG-2"), names, islands) == ()


def test_of_one_island_where_possible() -> None:
    assert choose(2, tuple("0123"), TWO_PAIRS) == ("0", "1")
    assert choose(2, tuple("123"), TWO_PAIRS) == ("2", "3"), "not 1 and 2"
    assert choose(1, tuple("123"), TWO_PAIRS) == ("1",), "pairs stay whole"
    assert choose(3, tuple("0123"), TWO_PAIRS) == ("0", "1", "2")
    assert choose(2, ("1", "2", "8"), TWO_PAIRS) == ("1", "2")
    assert choose(4, tuple("123"), TWO_PAIRS) is None
    assert choose(3, tuple("01234567"), ()) == ("0", "1", "2"), "nothing known: in order"


def test_gpus_are_taken_and_given_back_by_name() -> None:
    gpus = Gpus(tuple("0123"), TWO_PAIRS)
    assert gpus.take("a", 1)
    assert gpus.take("b", 2)
    assert gpus.visible("b") == "2,3"
    assert not gpus.take("c", 2)
    assert gpus.held == {"a": ("0",), "b": ("2", "3")}
    gpus.give_back("b")
    gpus.give_back("b")
    assert gpus.free == ("1", "2", "3")
    assert gpus.take("c", 2)
    assert gpus.visible("c") == "2,3"


def test_without_gpus_everybody_is_left_alone() -> None:
    gpus = Gpus()
    assert gpus.take("a", 8)
    assert gpus.visible("a") is None
    assert gpus.free == ()


def test_too_few_is_said_with_numbers() -> None:
    check_enough({"a": 2, "b": 2}, Gpus(tuple("0123")))
    check_enough({"a": 2, "b": 2}, Gpus())
    with pytest.raises(
        ConfigError, match=r"^3 instances need 1 \+ 2 \+ 2 = 5 GPUs, this machine offers 4; start fewer"
    ):
        check_enough({"a": 1, "b": 2, "c": 2}, Gpus(tuple("0123")))
