"""Requests wait for their turn: admission.py decides, this wakes whoever it is."""

from __future__ import annotations

import asyncio
from hashlib import blake2b

from vllm_fleet.core.env import Env
from vllm_fleet.router.admission import Admission
from vllm_fleet.router.call import Call
from vllm_fleet.router.fleet_view import FleetView
from vllm_fleet.router.request_rules import RequestRules
from vllm_fleet.router.waits import Ended, Wait, Waits

_Waiter = asyncio.Future[bool]


class Turns:
    """Places of one router's requests. Belongs to one event loop."""

    def __init__(self, view: FleetView, rules: RequestRules, env: Env, waits: Waits) -> None:
        self._view, self._rules, self._env, self._waits = view, rules, env, waits
        self._admission: Admission[_Waiter] = Admission(self._places, rules.queue_max)

    def _places(self, now: float) -> int:
        per_instance = self._rules.instance_requests_max
        ready = len(self._view.decodes(now)) if per_instance else 0
        if not ready:  # nobody would answer: let them be told so
            return self._rules.in_flight_max
        return min(self._rules.in_flight_max, per_instance * ready)

    @property
    def running(self) -> int:
        """Requests that have a place."""
        return self._admission.running

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return self._admission.waiting

    def enter(self) -> bool:
        """Whether there is a place at once; it then has to be left."""
        return self._admission.enter(self._env.now())

    async def wait(self, call: Call) -> bool:
        """Wait for a place, at most router.queue_s. Returns whether there is one; it then has to be left."""
        waiter: _Waiter = asyncio.get_running_loop().create_future()
        evicted = self._admission.wait(caller(call), waiter)
        if evicted is waiter:
            return False
        if evicted is not None and not evicted.done():
            evicted.set_result(False)
        placed = False
        try:
            with Wait(self._waits, self._env.now() + self._rules.queue_s):
                placed = await waiter
                return placed
        except Ended:
            return False
        finally:
            if not placed:
                self._give_up(waiter)

    def _give_up(self, waiter: _Waiter) -> None:
        given = waiter.done() and not waiter.cancelled() and waiter.result()
        waiter.cancel()
        if not self._admission.give_up(waiter) and given:
            self.leave()

    def leave(self) -> None:
        """A request that had a place is over."""
        self._admission.leave(self._env.now())
        self.call()

    def call(self) -> None:
        """Let in whoever may come in now."""
        while self._admission.waiting:
            waiter = self._admission.next(self._env.now())
            if waiter is None:
                return
            if waiter.done():
                self._admission.leave(self._env.now())
            else:
                waiter.set_result(True)

    def retry_after_s(self) -> int:
        """What to tell whoever is turned away now."""
        return self._admission.retry_after_s(self._env.now())


def caller(call: Call) -> str:
    """Who asks: the key's name where keys are known, else a digest of what the client authorizes itself with."""
    known = call.key or call.timeline.tenant
    if known:
        return known
    given = call.headers.get("authorization")
    return "" if given is None else blake2b(given.encode(errors="replace"), digest_size=8).hexdigest()
