"""Seeds that broke a promise once; the suite runs them always."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

World = Literal["controller", "lifecycle", "router"]
WORLDS: tuple[World, ...] = ("controller", "lifecycle", "router")
SEEDS_FILE = Path(__file__).with_name("seeds.txt")


def kept(world: World) -> list[int]:
    """The kept seeds of one world."""
    lines = [line.partition("#")[0].split() for line in SEEDS_FILE.read_text().splitlines()]
    return [int(words[1]) for words in lines if words and words[0] == world]
