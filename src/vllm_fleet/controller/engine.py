"""Runs decisions one after the other: decide, save, settle, tell. The only owner of state and store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from vllm_fleet.controller import journal, reactor
from vllm_fleet.controller.effects import Announce, Broadcast, Effect, Reply, Save
from vllm_fleet.controller.state import FleetState, Rules
from vllm_fleet.controller.stores.contract import Store, StoreFailed
from vllm_fleet.controller.watchers import Watchers
from vllm_fleet.core import limits, log
from vllm_fleet.core.env import Env
from vllm_fleet.core.errors import Busy
from vllm_fleet.wire.control import Member

Decide = Callable[[FleetState, float], list[Effect]]
"""One of the reactor's ``on_…`` functions, with its event filled in."""

Turn = tuple[Decide, asyncio.Future[Reply] | None]


def restore(store: Store, rules: Rules, fleet: str, env: Env) -> FleetState:
    """The state of the journal in ``store``, which is made when there is none.

    Raises:
        ConfigError: the journal is another fleet's or of another format.
        StoreFailed: there was no journal, and none can be made.
    """
    loaded = store.load()
    state = journal.restore(loaded, rules, fleet, env.now(), env.new_id())
    if loaded.dropped_bytes:
        log.warn("journal.truncated", dropped_bytes=loaded.dropped_bytes, revision=state.revision)
    if not loaded.records or loaded.dropped_bytes:
        try:
            store.rewrite(journal.to_records(state))
        except StoreFailed as error:
            if not loaded.records:
                raise
            log.warn("journal.failed", reason=str(error))
            reactor.settle(state, [], env.now(), failed=True, new_controller=env.new_id())
    return state


class Engine:
    """The controller without its HTTP. ``run`` must be running for ``submit`` to be answered."""

    def __init__(self, state: FleetState, store: Store, env: Env) -> None:
        self.state = state
        self.watchers = Watchers()
        self._store = store
        self._env = env
        self._waiting: asyncio.Queue[Turn | None] = asyncio.Queue(limits.CONTROL_QUEUE_MAX)
        self._tick_waits = False

    async def submit(self, decide: Decide) -> Reply:
        """Let ``decide`` have its turn; its reply, once what it changed is saved. Raises Busy when too many wait."""
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        try:
            self._waiting.put_nowait((decide, answer))
        except asyncio.QueueFull as error:
            raise Busy(f"{limits.CONTROL_QUEUE_MAX} requests wait already, the most there may be") from error
        return await answer

    async def run(self) -> None:
        """Work until ``stop``."""
        async with asyncio.TaskGroup() as tasks:
            ticking = tasks.create_task(self._tick())
            await self._act()
            ticking.cancel()

    async def stop(self) -> None:
        """Let ``run`` return after the turns that wait: a turn is never cut in the middle of saving."""
        await self._waiting.put(None)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self.state.rules.tick_s)
            if not self._tick_waits:  # while the disk is slow, ticks must not fill the queue
                self._tick_waits = True
                await self._waiting.put((reactor.on_tick, None))

    async def _act(self) -> None:
        while (turn := await self._waiting.get()) is not None:
            decide, answer = turn
            if answer is None:
                self._tick_waits = False
            elif answer.cancelled():
                continue  # nobody waits for it any more
            try:
                reply = await self._turn(decide)
            except Exception as error:  # noqa: BLE001 - outermost loop: one bad turn must not end the controller
                log.event("controller.bug", level=logging.ERROR, kind=type(error).__name__, reason=str(error))
                if answer is not None and not answer.done():
                    answer.set_exception(error)
                continue
            if answer is not None and not answer.done():
                assert reply is not None
                answer.set_result(reply)

    async def _turn(self, decide: Decide) -> Reply | None:
        effects = decide(self.state, self._env.now())
        entries = reactor.to_save(self.state, effects)
        failed = bool(entries) and not await self._saved(lambda: self._store.append(entries))
        shown = reactor.settle(
            self.state, effects, self._env.now(), failed=failed, new_controller=self._env.new_id() if failed else ""
        )
        reply = await self._show(shown)
        if self.state.durable and self._store.appended_bytes > limits.JOURNAL_BYTES_MAX:
            await self._compact()
        return reply

    async def _show(self, effects: Sequence[Effect]) -> Reply | None:
        reply = None
        for effect in effects:
            if isinstance(effect, Broadcast):
                self.watchers.publish(effect.change)
                _log_member(effect.change.member)
            elif isinstance(effect, Announce):
                self.watchers.publish(effect.snapshot)
            elif isinstance(effect, Save):
                if await self._rewritten():
                    reactor.on_saved(self.state)
                    log.event("journal.saved", revision=self.state.revision)
            elif isinstance(effect, Reply):
                reply = effect
        return reply

    async def _compact(self) -> None:
        if not await self._rewritten():
            failed = reactor.settle(self.state, [], self._env.now(), failed=True, new_controller=self._env.new_id())
            await self._show(failed)

    async def _rewritten(self) -> bool:
        records = journal.to_records(self.state)
        return await self._saved(lambda: self._store.rewrite(records))

    async def _saved(self, write: Callable[[], None]) -> bool:
        """Whether ``write`` saved. It runs in a thread: a slow disk stops neither watch streams nor /health."""
        try:
            await asyncio.to_thread(write)
        except StoreFailed as error:
            if self.state.durable:
                log.warn("journal.failed", reason=str(error))
            return False
        return True


def _log_member(member: Member) -> None:
    name = "member.gone" if member.state == "gone" else "member.changed"
    log.event(name, member=member.name, state=member.state, generation=member.generation, url=member.url)
