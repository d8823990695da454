"""All groups of the fleet. Pure; nothing is saved: after a restart members tell what they know."""

from __future__ import annotations

from collections.abc import Callable

from vllm_fleet.controller.group import Group
from vllm_fleet.controller.group_state import Numbers, Refusal, Standing
from vllm_fleet.core import limits
from vllm_fleet.wire.groups import Attendee, Hold, Meet

PAUSED_S = 0.5
"""A tick that comes so much too late says that this process did not run, or did not lead."""


class Groups:
    """Groups by name. ``run`` must be another one for every object: no epoch of one is taken for that of another."""

    def __init__(self, run: str, now: float) -> None:
        self.all: dict[str, Group] = {}
        self._numbers = Numbers(run)
        self._ticked = now

    def find(self, name: str) -> Group | None:
        return self.all.get(name)

    def meet(self, name: str, message: Meet, now: float) -> Refusal | None:
        """See Group.meet; the first one makes the group."""
        return self._with_new(name, now, lambda group: group.meet(message, now))

    def hold(self, name: str, message: Hold, now: float) -> Refusal | None:
        """See Group.hold; the first one after a restart makes the group."""
        return self._with_new(name, now, lambda group: group.hold(message, now))

    def tick(self, standing: Callable[[Attendee], Standing], now: float) -> None:
        """Call it every GROUP_TICK_S. Judges silence and deadlines, and forgets who was left alone."""
        late_s = now - self._ticked - limits.GROUP_TICK_S
        self._ticked = now
        for name, group in list(self.all.items()):
            if late_s >= PAUSED_S:
                group.shift(late_s)
            group.tick(standing, now)
            if group.empty_at is not None and now - group.empty_at >= limits.GROUP_FORGET_S:
                del self.all[name]

    def _with_new(self, name: str, now: float, act: Callable[[Group], Refusal | None]) -> Refusal | None:
        group = self.all.get(name)
        if group is not None:
            return act(group)
        if len(self.all) >= limits.GROUPS_MAX:
            return Refusal(503, "groups_full", f"the fleet has {limits.GROUPS_MAX} groups, the most there may be")
        if not self.all:
            self._ticked = now  # nobody ticks while there are no groups
        made = Group(name, self._numbers)
        refusal = act(made)
        if refusal is None:
            self.all[name] = made
        return refusal
