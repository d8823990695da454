"""How many retries a fleet that is sick may cause. Pure.

Deaths cost at most one retry for each request that the dead instance had, and the breaker ends that at once: they are
free. What repeats is not: an instance that answers 5xx or is too slow makes every request a retry, and retries make the
others sick, too. So these are a share of recent requests.
"""

from __future__ import annotations

from vllm_fleet.core import limits


class RetryBudget:
    """Counts over the current window and the one before it, of RETRY_WINDOW_S / 2 each."""

    __slots__ = ("_began", "_requests", "_retries", "_share")

    def __init__(self, share: float, now: float = 0.0) -> None:
        self._share, self._began = share, now
        self._requests, self._retries = [0, 0], [0, 0]

    def request(self, now: float) -> None:
        """A request came."""
        self._turn(now)
        self._requests[0] += 1

    def take(self, now: float) -> bool:
        """Whether one more retry may be made; counts it."""
        self._turn(now)
        if sum(self._retries) >= max(limits.RETRIES_FREE, self._share * sum(self._requests)):
            return False
        self._retries[0] += 1
        return True

    def _turn(self, now: float) -> None:
        half = limits.RETRY_WINDOW_S / 2
        passed = now - self._began
        if passed < half:
            return
        old = passed < 2 * half
        self._requests = [0, self._requests[0] if old else 0]
        self._retries = [0, self._retries[0] if old else 0]
        self._began = now - passed % half
