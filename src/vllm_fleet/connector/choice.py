"""Whether loading a prompt's KV or computing it is quicker, learnt from what both took. Pure: times are passed in."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

from vllm_fleet.core import limits

DECAY = 0.95
"""Weight of what was learnt before, at each load."""
STEP_TOKENS_MIN = 64  # steps that compute fewer tell little of the speed
STEPS_KEPT = 15
LOADS_MIN = 8  # loads seen from a peer before it is judged
AGAIN_EVERY = 20
"""One load in so many goes ahead although computing seems quicker: else nothing more would be learnt."""


@dataclass
class _Peer:
    """Load seconds over tokens: a line through what was seen, older loads fading."""

    seen: int = 0
    declined: int = 0
    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def learn(self, tokens: int, seconds: float) -> None:
        self.seen += 1
        for name, value in (
            ("weight", 1.0),
            ("x", tokens),
            ("y", seconds),
            ("xx", tokens * tokens),
            ("xy", tokens * seconds),
        ):
            setattr(self, name, DECAY * getattr(self, name) + value)

    def line(self) -> tuple[float, float]:
        """Seconds that every load takes, and seconds per token."""
        mean_x, mean_y = self.x / self.weight, self.y / self.weight
        variance = self.xx / self.weight - mean_x**2
        if variance > (0.1 * mean_x) ** 2:
            slope = (self.xy / self.weight - mean_x * mean_y) / variance
            slope = min(max(slope, 0.0), mean_y / mean_x)
        else:  # all alike: half of the time is taken for fixed
            slope = 0.5 * mean_y / mean_x
        return mean_y - slope * mean_x, slope


@dataclass
class Choice:
    """One decode engine's experience with its own speed and with each prefill instance."""

    peers: dict[str, _Peer] = field(default_factory=dict)
    steps: deque[float] = field(default_factory=lambda: deque(maxlen=STEPS_KEPT))
    """Seconds per token of the last steps that computed prompts."""

    def loaded(self, peer: str, tokens: int, seconds: float) -> None:
        """A load from ``peer`` took so long, without waiting for prefill to compute."""
        if tokens <= 0 or seconds < 0:
            return
        while peer not in self.peers and len(self.peers) >= limits.PEERS_MAX:
            del self.peers[next(iter(self.peers))]
        self.peers.setdefault(peer, _Peer()).learn(tokens, seconds)

    def computed(self, tokens: int, seconds: float) -> None:
        """A step of this engine computed so many tokens."""
        if tokens >= STEP_TOKENS_MIN and seconds > 0:
            self.steps.append(seconds / tokens)

    def loads(self, peer: str, tokens: int) -> bool:
        """Whether to load ``tokens`` from ``peer``; what is not known yet is loaded."""
        below = self.below(peer)
        if below is None or tokens >= below:
            return True
        known = self.peers[peer]
        known.declined += 1
        return known.declined % AGAIN_EVERY == 0

    def below(self, peer: str) -> int | None:
        """Prompts with fewer tokens to load are computed sooner than loaded; None: not enough is known.

        At most TOKENS_MAX, which stands for "always".
        """
        known = self.peers.get(peer)
        if known is None or known.seen < LOADS_MIN or len(self.steps) < STEPS_KEPT // 3:
            return None
        fixed, per_token = known.line()
        compute = statistics.median(self.steps)
        if compute <= per_token:
            return limits.TOKENS_MAX
        return min(limits.TOKENS_MAX, int(fixed / (compute - per_token)))
