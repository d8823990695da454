"""Which GPUs an instance gets: of those that are free, of one NVLink island where possible. Pure.

Islands come from ``nvidia-smi topo -m``. A GPU is named as CUDA_VISIBLE_DEVICES names it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from vllm_fleet.core.errors import ConfigError

_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")  # the header is underlined, also where it does not go to a terminal


@dataclass
class Gpus:
    """The GPUs of one machine and who has them. With none, everybody gets None: the environment is left alone."""

    all: tuple[str, ...] = ()
    islands: tuple[frozenset[str], ...] = ()
    """GPUs joined by NVLink; those in no island are alone."""
    held: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Instance -> its GPUs."""

    @property
    def managed(self) -> bool:
        """Whether GPUs are given out at all."""
        return bool(self.all)

    @property
    def free(self) -> tuple[str, ...]:
        """Those that nobody has, in order."""
        taken = {gpu for gpus in self.held.values() for gpu in gpus}
        return tuple(gpu for gpu in self.all if gpu not in taken)

    def take(self, name: str, count: int) -> bool:
        """Give ``count`` GPUs to an instance; False, and nothing changes, when fewer are free."""
        assert name not in self.held, f"{name} has GPUs already"
        if not self.managed:
            return True
        chosen = choose(count, self.free, self.islands)
        if chosen is None:
            return False
        self.held[name] = chosen
        return True

    def give_back(self, name: str) -> None:
        """The instance's processes are gone. Safe to call twice."""
        self.held.pop(name, None)

    def visible(self, name: str) -> str | None:
        """CUDA_VISIBLE_DEVICES of an instance; None leaves it alone."""
        return ",".join(self.held[name]) if name in self.held else None


def choose(count: int, free: Sequence[str], islands: Iterable[frozenset[str]]) -> tuple[str, ...] | None:
    """``count`` of the free GPUs, in their order; None when there are fewer.

    The island with the fewest free GPUs that still holds all of them: large ones stay whole for those that need them.
    Where none does, the largest come first, so that as few islands as possible are joined.
    """
    if count > len(free):
        return None
    groups = _groups(free, islands)
    fitting = [group for group in groups if len(group) >= count]
    if fitting:
        return tuple(min(fitting, key=len)[:count])
    chosen: set[str] = set()
    for group in sorted(groups, key=len, reverse=True):
        chosen.update(group[: count - len(chosen)])
    return tuple(gpu for gpu in free if gpu in chosen)


def _groups(free: Sequence[str], islands: Iterable[frozenset[str]]) -> list[list[str]]:
    """The free GPUs by island, in the order of their first; without any island they are all one."""
    known = list(islands)
    if not known:
        return [list(free)]
    groups: dict[frozenset[str], list[str]] = {}
    for gpu in free:
        island = next((one for one in known if gpu in one), frozenset({gpu}))
        groups.setdefault(island, []).append(gpu)
    return list(groups.values())


def check_enough(needed: Mapping[str, int], gpus: Gpus) -> None:
    """ConfigError when the instances, by name, need more GPUs than there are."""
    total = sum(needed.values())
    if gpus.managed and total > len(gpus.all):
        each = " + ".join(map(str, needed.values()))
        raise ConfigError(
            f"{len(needed)} instances need {each} = {total} GPUs, this machine offers {len(gpus.all)}; "
            "start fewer, or set env.CUDA_VISIBLE_DEVICES to let instances share GPUs"
        )


def parse_topology(text: str) -> tuple[frozenset[int], ...]:
    """The NVLink islands in the answer of ``nvidia-smi topo -m``, as sets of GPU numbers; single GPUs are none.

    Cells between GPUs say NV and the number of links where NVLink joins them, else the way over PCIe or the processors.
    """
    rows = [_ESCAPE.sub("", line).split("\t") for line in text.splitlines()]
    cells = [[cell.strip() for cell in row] for row in rows]
    header = next((row for row in cells if "GPU0" in row[1:]), None)
    if header is None:
        return ()
    columns = {at: int(name[3:]) for at, name in enumerate(header) if re.fullmatch(r"GPU\d+", name)}
    joined: dict[int, set[int]] = {number: {number} for number in columns.values()}
    for row in cells:
        if row is header or not re.fullmatch(r"GPU\d+", row[0]):
            continue
        own = int(row[0][3:])
        for at, other in columns.items():
            if at < len(row) and re.fullmatch(r"NV\d+", row[at]) and own in joined:
                merged = joined[own] | joined[other]
                for number in merged:
                    joined[number] = merged
    found = {frozenset(island) for island in joined.values() if len(island) > 1}
    return tuple(sorted(found, key=min))


def parse_names(text: str) -> dict[str, int]:
    """GPU numbers by number and by UUID, from ``nvidia-smi --query-gpu=index,uuid --format=csv,noheader``."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        index, _, uuid = (part.strip() for part in line.partition(","))
        if index.isdecimal():
            found |= {index: int(index), uuid: int(index)} if uuid else {index: int(index)}
    return found


def islands_of(visible: Sequence[str], names: Mapping[str, int], islands: Iterable[Iterable[int]]) -> tuple[
    frozenset[str], ...
]:  # fmt: skip
    """The islands in the names of ``visible``; UUIDs may be shortened, as CUDA takes them."""
    numbers: dict[str, int] = {}
    for gpu in visible:
        matching = {number for name, number in names.items() if name == gpu or (len(gpu) > 4 and name.startswith(gpu))}
        if len(matching) == 1:
            numbers[gpu] = matching.pop()
    found = (frozenset(gpu for gpu, number in numbers.items() if number in set(island)) for island in islands)
    return tuple(island for island in found if len(island) > 1)
