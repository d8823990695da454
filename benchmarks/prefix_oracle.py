"""The trace of benchmarks.prefix_trace, and the best any router could do with it. Pure."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass

from benchmarks.prefix_instances import BLOCK_TOKENS, TOKEN_BYTES, hash_word
from vllm_fleet.bench.mock_cache import MockCache, block_hashes


@dataclass(frozen=True)
class Turn:
    """What a user says, and how long the answer is to be."""

    text: str
    answer_tokens: int
    pause_s: float


@dataclass(frozen=True)
class Session:
    """One conversation with one application."""

    at_s: float
    system: str
    turns: tuple[Turn, ...]


def words(seed: str, tokens: int) -> str:
    """Text of so many tokens, unlike other texts from its first bytes on."""
    size, text, word = tokens * TOKEN_BYTES, "", seed
    while len(text) < size:
        word = hash_word(word + seed)
        text += word + " "
    return text[:size]


def make_trace(sessions: int, apps: int, rate: float, seed: int) -> list[Session]:
    """Sessions of a few turns, ``rate`` new ones a second; some applications are asked far more often than others."""
    draw = random.Random(seed)
    systems = [words(f"app {number}", draw.randint(500, 2000)) for number in range(apps)]
    weights = [1 / (1 + number) for number in range(apps)]
    found, at = [], 0.0
    for number in range(sessions):
        at += draw.expovariate(rate)
        system = draw.choices(systems, weights)[0]
        turns = tuple(
            Turn(words(f"{number} {turn}", draw.randint(40, 400)), draw.randint(20, 150), draw.expovariate(1.0))
            for turn in range(draw.randint(1, 8))
        )
        found.append(Session(at, system, turns))
    return found


def pooled(order: list[tuple[str, str]], blocks: int) -> float:
    """The share that one cache as large as all together hits which evicts as vLLM does: by last use."""
    cache = MockCache(blocks, BLOCK_TOKENS, TOKEN_BYTES)
    hits = total = 0
    for prompt, answer in order:
        held = cache.begin(prompt.encode())
        cache.grow(held, (prompt + answer).encode())
        cache.end(held)
        cache.events.clear()
        tokens = len(prompt) // TOKEN_BYTES
        hits += min(held.hit * BLOCK_TOKENS, tokens)
        total += tokens
    return hits / total if total else 0.0


def best_possible(order: list[tuple[str, str]], blocks: int) -> float:
    """The share of prompt tokens that one cache as large as all together hits, if it knows the future (Belady's MIN).

    No way to spread the requests over parts of that cache can do better. ``order``: prompts and answers as they came.
    """
    size = BLOCK_TOKENS * TOKEN_BYTES
    asked = [block_hashes(prompt.encode(), size) for prompt, _ in order]
    stored = [block_hashes((prompt + answer).encode(), size) for prompt, answer in order]
    next_use: dict[int, list[int]] = {}
    for at in range(len(asked) - 1, -1, -1):
        for one in asked[at]:
            next_use.setdefault(one, []).append(at)
    cached: set[int] = set()
    by_use: list[tuple[int, int]] = []
    hits = total = 0
    for at, (prompt, _) in enumerate(order):
        count = 0
        while count < len(asked[at]) and asked[at][count] in cached:
            count += 1
        tokens = len(prompt) // TOKEN_BYTES
        hits += min(count * BLOCK_TOKENS, tokens)
        total += tokens
        for one in asked[at]:
            next_use[one].pop()
        for one in stored[at]:
            uses = next_use.get(one)
            if not uses:
                cached.discard(one)  # never asked for again
                continue
            cached.add(one)
            heapq.heappush(by_use, (-uses[-1], one))
        while len(cached) > blocks:
            use, one = heapq.heappop(by_use)
            uses = next_use.get(one)
            if one in cached and uses and uses[-1] == -use:
                cached.discard(one)
    return hits / total if total else 0.0
