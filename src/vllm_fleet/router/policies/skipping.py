"""When a handoff is not worth it: decode computes what is missing itself. Pure."""

from __future__ import annotations

from typing import NamedTuple

from vllm_fleet.router.policies.facts import Facts


class Skipping(NamedTuple):
    """Thresholds. The default never skips."""

    min_tokens: int = 0
    """Prompts of which decode would have to compute fewer tokens than this are not handed off."""
    cached_share: float = 1.0
    """Nor are those of which decode holds this share, if it is below 1."""

    def short(self, facts: Facts) -> bool:
        """Whether the whole prompt is too short. Costs nothing where the threshold is 0."""
        return self.min_tokens > 0 and facts.tokens < self.min_tokens

    def cached(self, facts: Facts, held: float) -> bool:
        """Whether decode holds so much of the prompt, ``held`` of 1, that the rest is its own to compute."""
        if held <= 0.0:
            return False
        return held >= self.cached_share < 1.0 or facts.tokens * (1.0 - held) < self.min_tokens
