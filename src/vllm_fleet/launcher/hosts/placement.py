"""Which process goes to which node of a cluster. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm_fleet.core import limits
from vllm_fleet.core.errors import Busy

SHOWN = {"CPU": "CPUs", "GPU": "GPUs"}
_HIDDEN = ("node:", "accelerator_type:", "object_store_memory", "memory")
_ROOM = 1e-6  # Ray counts in ten-thousandths; sums of floats do not


@dataclass(frozen=True)
class Node:
    """One living node: what it offers in all and what is free of that."""

    id: str
    address: str
    total: Mapping[str, float]
    free: Mapping[str, float]


@dataclass(frozen=True)
class Ask:
    """One process and what it needs; amounts of 0 are as good as absent."""

    name: str
    role: str
    needs: Mapping[str, float]


def place(asks: Sequence[Ask], nodes: Sequence[Node], held: Sequence[tuple[str, str]] = ()) -> dict[str, str]:
    """Name -> id of a node, for each of ``asks``; ``held`` are the (role, node id) of processes that run already.

    Each role is spread over the nodes, so that the loss of one node costs as little of each as can be. Where spreading
    leaves no room for somebody, they are packed instead.

    Raises:
        Busy: there is no room; says for whom, what it needs and what there is.
    """
    order = sorted(asks, key=lambda ask: (-_size(ask), -ask.needs.get("CPU", 0.0)))
    found = _spread(order, nodes, held)
    if found is None:
        found = _pack(order, nodes)
    if found is None:
        raise Busy(_refusal(order, nodes))
    return {ask.name: found[ask.name] for ask in asks}


def fits(needs: Mapping[str, float], free: Mapping[str, float]) -> bool:
    """Whether a node with so much free can hold it."""
    return all(free.get(kind, 0.0) + _ROOM >= amount for kind, amount in needs.items() if amount)


def _size(ask: Ask) -> float:
    """What is scarce first: GPUs, then whatever the user named."""
    scarce = sum(amount for kind, amount in ask.needs.items() if kind not in ("CPU", "GPU"))
    return 1000 * ask.needs.get("GPU", 0.0) + scarce


def _less(free: Mapping[str, float], needs: Mapping[str, float]) -> dict[str, float]:
    return {kind: amount - needs.get(kind, 0.0) for kind, amount in free.items()}


def _spread(asks: Sequence[Ask], nodes: Sequence[Node], held: Sequence[tuple[str, str]]) -> dict[str, str] | None:
    free = {node.id: dict(node.free) for node in nodes}
    alike = Counter(held)
    count = Counter(node for _, node in held)
    found: dict[str, str] = {}
    for ask in asks:
        able = [node for node in nodes if fits(ask.needs, free[node.id])]
        if not able:
            return None
        best = min(
            able,
            key=lambda node: (
                alike[ask.role, node.id], count[node.id], -free[node.id].get("GPU", 0.0),
                -free[node.id].get("CPU", 0.0), node.id,
            ),
        )  # fmt: skip
        found[ask.name] = best.id
        free[best.id] = _less(free[best.id], ask.needs)
        alike[ask.role, best.id] += 1
        count[best.id] += 1
    return found


def _pack(asks: Sequence[Ask], nodes: Sequence[Node]) -> dict[str, str] | None:
    """The fullest node that fits, and back again where that led nowhere; PLACEMENT_STEPS_MAX steps at most."""
    free = {node.id: dict(node.free) for node in nodes}
    found: dict[str, str] = {}
    steps = 0

    def rest(at: int) -> bool:
        nonlocal steps
        if at == len(asks):
            return True
        ask, tried = asks[at], []
        for node in sorted(nodes, key=lambda node: (free[node.id].get("GPU", 0.0), free[node.id].get("CPU", 0.0))):
            before = free[node.id]
            if before in tried or not fits(ask.needs, before):  # a node just like one that led nowhere leads nowhere
                continue
            steps += 1
            if steps > limits.PLACEMENT_STEPS_MAX:
                return False
            tried.append(before)
            free[node.id], found[ask.name] = _less(before, ask.needs), node.id
            if rest(at + 1):
                return True
            free[node.id] = before
        return False

    return dict(found) if rest(0) else None


def _refusal(asks: Sequence[Ask], nodes: Sequence[Node]) -> str:
    total: dict[str, float] = {}
    for ask in asks:
        for kind, amount in _asked(ask).items():
            total[kind] = total.get(kind, 0.0) + amount
    worst = next((ask for ask in asks if not any(fits(ask.needs, node.free) for node in nodes)), asks[0])
    offers = "; ".join(f"{node.address} has {_words(node.free, node.total)} free" for node in nodes) or "it has no node"
    if any(fits(worst.needs, node.free) for node in nodes):
        wanted = f"{len(asks)} instances, {_words(total)} together"
    else:
        wanted = f"{worst.name}, which needs {_words(_asked(worst))} on one node"
    return f"the cluster has no room for {wanted}: {offers}"


def _asked(ask: Ask) -> dict[str, float]:
    return {kind: amount for kind, amount in ask.needs.items() if amount}


def _words(amounts: Mapping[str, float], kinds: Mapping[str, float] | None = None) -> str:
    names = [kind for kind in (amounts if kinds is None else kinds) if not kind.startswith(_HIDDEN)]
    return ", ".join(f"{amounts.get(kind, 0.0):g} {SHOWN.get(kind, kind)}" for kind in sorted(names)) or "nothing"
