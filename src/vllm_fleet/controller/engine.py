"""Runs decisions one after the other: decide, save, settle, tell. The only owner of state and store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from vllm_fleet.controller import journal, reactor
from vllm_fleet.controller.effects import Announce, Broadcast, Effect, Reply, Save
from vllm_fleet.controller.state import FleetState, Rules
from vllm_fleet.controller.stores.contract import Store, StoreFailed, StoreLost
from vllm_fleet.controller.turns import Decide as Decide
from vllm_fleet.controller.turns import become, decide_together
from vllm_fleet.controller.watchers import Watchers
from vllm_fleet.core import limits, log
from vllm_fleet.core.env import Env
from vllm_fleet.core.errors import Busy, NotLeader
from vllm_fleet.wire.control import Change, Desired

Turn = tuple[Decide, asyncio.Future[Reply] | None]


def restore(store: Store, rules: Rules, fleet: str, env: Env) -> FleetState:
    """The state of the journal in ``store``, which is made when there is none.

    Raises:
        ConfigError: the journal is another fleet's or of another format.
        StoreFailed: there was no journal, or an older one, and none can be made.
    """
    loaded = store.load()
    state = journal.restore(loaded, rules, fleet, env.now(), env.new_id())
    if loaded.dropped_bytes:
        log.warn("journal.truncated", dropped_bytes=loaded.dropped_bytes, revision=state.revision)
    if loaded.ahead is not None:
        log.warn("journal.older", revision=state.revision, generation=state.generation)
    if (
        not loaded.records
        or loaded.ahead is not None
        or state.revision != journal.NO_MARK.after(loaded.records).revision
    ):
        try:
            store.rewrite(journal.to_records(state))
        except StoreFailed as error:
            if not loaded.records or loaded.ahead is not None:
                raise
            log.warn("journal.failed", reason=str(error))
            reactor.settle(state, [], env.now(), failed=True, new_controller=env.new_id())
    return state


class Lead(Protocol):
    """Whether this controller may speak for the fleet (leader.Leadership, where several controllers run)."""

    def holds(self) -> bool:
        """Certainly, now."""
        ...

    def refusal(self) -> NotLeader:
        """What to answer when not."""
        ...


class Alone:
    """The only controller of its fleet always leads."""

    def holds(self) -> bool:
        return True

    def refusal(self) -> NotLeader:
        return NotLeader("this controller does not lead the fleet any more")


class Engine:
    """The controller without its HTTP. ``run`` must be running for ``submit`` to be answered.

    While it does not lead, ``submit`` raises NotLeader and nothing is decided: time in which it was mute counts as
    nobody's silence. Once ``lost`` is set it never leads again.
    """

    def __init__(self, state: FleetState, store: Store, env: Env, lead: Lead | None = None) -> None:
        self.state = state
        self.watchers = Watchers()
        self.lost = asyncio.Event()
        self._lead = Alone() if lead is None else lead
        self._store = store
        self._env = env
        self._waiting: asyncio.Queue[Turn | None] = asyncio.Queue(limits.CONTROL_QUEUE_MAX)
        self._tick_waits = False
        self._in_turn = False

    @property
    def durable(self) -> bool:
        """Whether joins can be saved now, as far as is known."""
        return self.state.durable and self.leads()

    def leads(self) -> bool:
        """Whether what this engine says is the fleet's truth."""
        return not self.lost.is_set() and self._lead.holds()

    def check_leads(self) -> None:
        """Raise NotLeader, which may say who does, when this controller does not lead."""
        if not self.leads():
            raise self._lead.refusal()

    def attempt(self, decide: Decide) -> Reply | None:
        """The reply at once, where ``decide`` changes nothing that is saved; None: submit it, to be decided again in
        its turn, as always while a turn waits for the disk. It goes before turns that have not begun: nobody was told
        of those yet, so nobody can know that it came after them. Raises NotLeader.
        """
        self.check_leads()
        if self._in_turn:
            return None
        effects = decide(self.state, self._env.now())
        only = effects[0] if len(effects) == 1 else None
        return only if isinstance(only, Reply) else None

    async def submit(self, decide: Decide) -> Reply:
        """Let ``decide`` have its turn; its reply, once what it changed is saved. Raises Busy when too many wait, and
        NotLeader; the change may be saved all the same.
        """
        self.check_leads()
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        try:
            self._waiting.put_nowait((decide, answer))
        except asyncio.QueueFull as error:
            raise Busy(f"{limits.CONTROL_QUEUE_MAX} requests wait already, the most there may be") from error
        reply = await answer
        self.check_leads()
        return reply

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
            if not self._tick_waits and self.leads():  # while the disk is slow, ticks must not fill the queue
                self._tick_waits = True
                await self._waiting.put((reactor.on_tick, None))

    async def _act(self) -> None:
        working = True
        while working:
            taken = [await self._waiting.get()]
            while taken[-1] is not None and len(taken) < limits.CONTROL_BATCH_MAX and not self._waiting.empty():
                taken.append(self._waiting.get_nowait())
            working = taken[-1] is not None
            self._in_turn = True
            await self._act_on([turn for turn in taken if turn is not None])
            self._in_turn = False

    async def _act_on(self, taken: Sequence[Turn]) -> None:
        if any(answer is None for _, answer in taken):
            self._tick_waits = False
        turns = [turn for turn in taken if turn[1] is None or not turn[1].cancelled()]  # else nobody waits any more
        alone = False
        for at, (decide, answer) in enumerate(turns):
            try:
                self.check_leads()
                if not alone and at + 1 < len(turns) and self._saves(decide):
                    if await self._act_together(turns[at:]):
                        return
                    alone = True
                reply = await self._turn(decide)
            except (NotLeader, StoreLost) as error:
                self._refuse(answer, error)
            except Exception as error:  # noqa: BLE001 - outermost loop: one bad turn must not end the controller
                log.event("controller.bug", level=logging.ERROR, kind=type(error).__name__, reason=str(error))
                if answer is not None and not answer.done():
                    answer.set_exception(error)
            else:
                _tell(answer, reply)

    def _saves(self, decide: Decide) -> bool:
        """Whether its turn has to wait for the disk, so that others may share the write. Most do not: a draft of the
        state for two heartbeats costs more than the heartbeats, and more of them come meanwhile.
        """
        return self.state.durable and bool(reactor.to_save(self.state, decide(self.state, self._env.now())))

    async def _act_together(self, turns: Sequence[Turn]) -> bool:
        """Save with one write what these turns change. False: nothing was changed, and each is to have its own."""
        try:
            self.check_leads()
            made = decide_together(self.state, [decide for decide, _ in turns], self._env.now())
            saved = not made.entries or await self._saved(lambda: self._store.append(made.entries))
        except Exception:  # noqa: BLE001 - it comes again in the turn whose it is, and is told to whom it concerns
            return False
        if not saved:
            failed = reactor.settle(self.state, [], self._env.now(), failed=True, new_controller=self._env.new_id())
            await self._show(failed)
            return False
        become(self.state, made.draft)
        for (_, answer), shown in zip(turns, made.shown, strict=True):
            _tell(answer, await self._show(shown))
        await self._compact_if_due()
        return True

    def _refuse(self, answer: asyncio.Future[Reply] | None, error: NotLeader | StoreLost) -> None:
        if isinstance(error, StoreLost) and not self.lost.is_set():
            log.warn("journal.fenced", reason=str(error))
            self.lost.set()
        if answer is not None and not answer.done():
            answer.set_exception(error if isinstance(error, NotLeader) else self._lead.refusal())

    async def _turn(self, decide: Decide) -> Reply | None:
        effects = decide(self.state, self._env.now())
        entries = reactor.to_save(self.state, effects)
        failed = bool(entries) and not await self._saved(lambda: self._store.append(entries))
        shown = reactor.settle(
            self.state, effects, self._env.now(), failed=failed, new_controller=self._env.new_id() if failed else ""
        )
        reply = await self._show(shown)
        await self._compact_if_due()
        return reply

    async def _show(self, effects: Sequence[Effect]) -> Reply | None:
        reply = None
        for effect in effects:
            if isinstance(effect, Broadcast):
                self.watchers.publish(effect.change)
                _log_change(effect.change)
            elif isinstance(effect, Announce):
                self.watchers.publish(effect.snapshot)
            elif isinstance(effect, Save):
                if await self._rewritten():
                    reactor.on_saved(self.state)
                    log.event("journal.saved", revision=self.state.revision)
            elif isinstance(effect, Reply):
                reply = effect
        return reply

    async def _compact_if_due(self) -> None:
        due = self.state.durable and self._store.appended_bytes > limits.JOURNAL_BYTES_MAX
        if due and not await self._rewritten():
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


def _tell(answer: asyncio.Future[Reply] | None, reply: Reply | None) -> None:
    if answer is not None and not answer.done():
        assert reply is not None
        answer.set_result(reply)


def _log_change(change: Change | Desired) -> None:
    if isinstance(change, Desired):
        log.event("desired.changed", revision=change.revision, instances=len(change.instances))
        return
    member = change.member
    name = "member.gone" if member.state == "gone" else "member.changed"
    log.event(name, member=member.name, state=member.state, generation=member.generation, url=member.url)
