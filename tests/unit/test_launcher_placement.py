"""launcher.hosts.placement: who goes where."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_fleet.core.errors import Busy
from vllm_fleet.launcher.hosts.placement import Ask, Node, fits, place


def node(name: str, **free: float) -> Node:
    return Node(name, f"10.0.0.{name}", {**free, "node:10.0.0.1": 1.0, "memory": 1e9}, free)


def ask(name: str, role: str = "both", **needs: float) -> Ask:
    return Ask(name, role, needs)


def test_each_role_is_spread() -> None:
    asks = [ask(f"{role}-{at}", role, CPU=1, GPU=1) for role in ("prefill", "decode") for at in range(2)]
    found = place(asks, [node("1", CPU=8, GPU=4), node("2", CPU=8, GPU=4)])
    assert list(found) == ["prefill-0", "prefill-1", "decode-0", "decode-1"]
    assert Counter((each.role, found[each.name]) for each in asks) == Counter(
        {("prefill", "1"): 1, ("prefill", "2"): 1, ("decode", "1"): 1, ("decode", "2"): 1}
    )


def test_what_runs_already_counts() -> None:
    nodes = [node("1", CPU=8), node("2", CPU=8), node("3", CPU=8)]
    assert place([ask("decode-2", "decode", CPU=1)], nodes, [("decode", "1"), ("decode", "2")]) == {"decode-2": "3"}
    held = [("decode", "1"), ("prefill", "2"), ("prefill", "2"), ("prefill", "3")]
    assert place([ask("decode-2", "decode", CPU=1)], nodes, held) == {"decode-2": "3"}


def test_spreading_gives_way_to_room() -> None:
    asks = [ask("both-0", GPU=6), ask("both-1", GPU=4), ask("both-2", GPU=4)]
    assert place(asks, [node("1", GPU=8), node("2", GPU=6)]) == {"both-0": "2", "both-1": "1", "both-2": "1"}


def test_named_resources_are_kept_apart() -> None:
    asks = [ask("prefill-0", "prefill", CPU=1, h200=1), ask("decode-0", "decode", CPU=1, l40=1)]
    assert place(asks, [node("1", CPU=2, l40=1), node("2", CPU=2, h200=1)]) == {"prefill-0": "2", "decode-0": "1"}


def test_a_refusal_says_who_what_and_what_there_is() -> None:
    nodes = [node("1", CPU=3, GPU=1), Node("2", "10.0.0.2", {"CPU": 4.0, "GPU": 8.0}, {"CPU": 4.0})]
    with pytest.raises(Busy) as caught:
        place([ask("decode-0", "decode", CPU=1, GPU=2, h200=0)], nodes)
    assert str(caught.value) == (
        "the cluster has no room for decode-0, which needs 1 CPUs, 2 GPUs on one node: "
        "10.0.0.1 has 3 CPUs, 1 GPUs free; 10.0.0.2 has 4 CPUs, 0 GPUs free"
    )
    with pytest.raises(Busy, match=r"^the cluster has no room for 3 instances, 3 GPUs together: 10\.0\.0\.1 has "):
        place([ask(f"both-{at}", GPU=1) for at in range(3)], [node("1", GPU=1), node("2", GPU=1)])
    with pytest.raises(Busy, match="it has no node"):
        place([ask("both-0", CPU=1)], [])


def test_nothing_asked_for_fits_everywhere() -> None:
    assert place([ask("both-0", CPU=0, GPU=0)], [node("1")]) == {"both-0": "1"}
    assert place([], []) == {}


def test_sums_of_fractions_fit() -> None:
    assert len(place([ask(f"both-{at}", CPU=0.1) for at in range(10)], [node("1", CPU=1)])) == 10


def possible(asks: Sequence[Ask], nodes: Sequence[Node]) -> bool:
    for chosen in itertools.product(nodes, repeat=len(asks)):
        needed: dict[str, Counter[str]] = {each.id: Counter() for each in nodes}
        for each, where in zip(asks, chosen, strict=True):
            needed[where.id].update({kind: int(amount) for kind, amount in each.needs.items()})
        if all(fits(needed[each.id], each.free) for each in nodes):
            return True
    return False


AMOUNTS = st.fixed_dictionaries({"CPU": st.integers(0, 4), "GPU": st.integers(0, 8), "x": st.integers(0, 1)})


@settings(deadline=None)
@given(st.lists(AMOUNTS, min_size=1, max_size=4), st.lists(AMOUNTS, max_size=3))
def test_room_is_found_where_there_is_some(needs: list[dict[str, int]], free: list[dict[str, int]]) -> None:
    asks = [Ask(f"both-{at}", "both", {k: float(v) for k, v in one.items()}) for at, one in enumerate(needs)]
    nodes = [Node(str(at), str(at), {}, {k: float(v) for k, v in one.items()}) for at, one in enumerate(free)]
    try:
        found = place(asks, nodes)
    except Busy:
        assert not possible(asks, nodes)
        return
    for each in nodes:
        mine = [one for one in asks if found[one.name] == each.id]
        for kind in ("CPU", "GPU", "x"):
            assert sum(one.needs[kind] for one in mine) <= each.free[kind]
