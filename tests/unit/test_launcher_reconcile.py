"""launcher.reconcile: who joins, leaves and is replaced, as whole effect lists."""

from __future__ import annotations

from vllm_fleet.launcher.events import (
    Answered,
    AskDrain,
    Began,
    Declare,
    Declared,
    DrainAnswer,
    Effect,
    Exited,
    Forget,
    Kill,
    Note,
    Probe,
    Start,
    StopAsked,
    Terminate,
    Tick,
    Watched,
)
from vllm_fleet.launcher.fleet import Child, Fleet, Rules
from vllm_fleet.launcher.gpus import Gpus
from vllm_fleet.launcher.reactor import step
from vllm_fleet.wire.control import Desired, Load, Member, Slot, State
from vllm_fleet.wire.names import Role

P0, D0, D1 = Slot("prefill-0", "prefill"), Slot("decode-0", "decode"), Slot("decode-1", "decode")
RULES = Rules(ready_s=100.0, stop_s=8.0, drain_s=60.0, quiet_s=1.5, held_s=30.0)
IDLE = Load(0, 0)


class World:
    """A fleet that serves, its controller's view, and a clock."""

    def __init__(self, *slots: Slot, rules: Rules = RULES, gpus: Gpus | None = None) -> None:
        own = {name: Child(name, name) for name in ("controller", "router")}
        children = {slot.name: Child(slot.name, "instance", role=slot.role) for slot in slots}
        self.fleet = Fleet({**own, **children}, rules, slots, Gpus() if gpus is None else gpus)
        self.now = 0.0
        self.generation = 0
        self.revision = 1
        self.members: dict[str, Member] = {}
        step(self.fleet, Began(), 0.0)
        step(self.fleet, Answered("controller", healthy=True), 0.0)
        step(self.fleet, Declared(Desired(1, slots)), 0.0)
        for name in ("router", *children):
            self.starts(name)
        assert self.fleet.phase == "serving"

    def step(self, event: object, after_s: float = 0.0) -> list[Effect]:
        self.now += after_s
        return step(self.fleet, event, self.now)  # type: ignore[arg-type]

    def tick(self, after_s: float = 0.0) -> list[Effect]:
        return self.step(Tick(), after_s)

    def starts(self, name: str, role: Role | None = None) -> list[Effect]:
        """A process that was started becomes ready, for us and for the controller."""
        child = self.fleet.children[name]
        effects = self.step(Answered(name, healthy=True))
        if child.kind == "instance":
            self.generation += 1
            self.known(name, "ready", role or child.role or "both", self.generation)
            effects += self.watched()
        return effects

    def known(self, name: str, state: State, role: Role, generation: int) -> None:
        self.members[name] = Member(name, role, f"http://127.0.0.1/{name}", 1, f"life-{generation}", generation, state)

    def watched(self) -> list[Effect]:
        return self.step(Watched(Desired(self.revision, self.fleet.slots), dict(self.members)))

    def desire(self, *slots: Slot) -> list[Effect]:
        self.revision += 1
        return self.step(Watched(Desired(self.revision, slots), dict(self.members)))

    def drained(self, name: str) -> list[Effect]:
        """Tell and ask until it is idle long enough; what is done then."""
        for _ in range(20):
            for effect in self.tick(0.4):
                if isinstance(effect, AskDrain):
                    found = self.step(DrainAnswer(name, told=True, load=IDLE))
                    if found:
                        return found
        raise AssertionError(f"{name} does not leave")

    def gone(self, name: str) -> list[Effect]:
        """Its processes end."""
        self.members.pop(name, None)
        self.watched()
        return self.step(Exited(name, 0))

    def states(self) -> dict[str, str]:
        return {child.name: child.state for child in self.fleet.instances()}


def draining(name: str) -> Note:
    return Note("child.draining", name, f"{name} gets no new requests; running ones finish")


# The controller is told, and heard ---------------------------------------------------------------------------------


def test_the_controller_is_told_until_it_knows() -> None:
    fleet = Fleet({"controller": Child("controller", "controller"), "both-0": Child("both-0", "instance", role="both")},
                  RULES, (Slot("both-0", "both"),))  # fmt: skip
    step(fleet, Began(), 0.0)
    assert step(fleet, Answered("controller", healthy=True), 0.0) == [Declare(), Start("both-0")]
    assert step(fleet, Tick(), 0.1) == [], "one at a time"
    step(fleet, Declared(None), 0.2)
    assert Declare() not in step(fleet, Tick(), 0.9)
    assert Declare() in step(fleet, Tick(), 1.1)
    step(fleet, Declared(Desired(7, fleet.slots)), 1.2)
    assert Declare() not in step(fleet, Tick(), 9.0)
    assert fleet.revision == 7


def test_what_others_say_before_we_spoke_is_of_an_earlier_fleet() -> None:
    world = World(D0)
    world.fleet.declared = False
    assert world.step(Watched(Desired(9, (D1,)), {})) == []
    assert world.fleet.slots == (D0,)


def test_a_controller_that_lost_its_journal_is_told_again() -> None:
    world = World(D0)
    world.desire(D0, D1)
    assert world.step(Watched(Desired(), {})) == []
    assert world.tick(1.0)[-1] == Declare()
    assert list(world.fleet.slots) == [D0, D1], "meanwhile the fleet stays as it was to be"
    world.step(Declared(Desired(1, (D0, D1))))
    world.step(Watched(Desired(2, (D0,)), {}))
    assert list(world.fleet.slots) == [D0], "a new journal counts from the beginning"


def test_older_news_are_ignored() -> None:
    world = World(D0)
    world.desire(D0, D1)
    world.step(Watched(Desired(1, (D0,)), {}))
    assert world.fleet.slots == (D0, D1)


# Joining and leaving -----------------------------------------------------------------------------------------------


def test_a_new_instance_is_started_and_probed() -> None:
    world = World(P0, D0)
    assert world.desire(P0, D0, D1) == [Start("decode-1")]
    assert world.tick(0.3) == [Probe("decode-1")]
    world.starts("decode-1")
    assert world.states() == {"prefill-0": "ready", "decode-0": "ready", "decode-1": "ready"}


def test_an_instance_leaves_when_it_has_been_idle_for_a_while() -> None:
    world = World(P0, D0, D1)
    assert world.desire(P0, D0) == [draining("decode-1")]
    assert world.tick(0.1) == [AskDrain("decode-1", 3)]
    assert world.tick(0.1) == [], "one question at a time"
    assert world.step(DrainAnswer("decode-1", told=True, load=Load(2, 0))) == []
    assert world.tick(0.2) == []
    assert world.tick(0.2) == [AskDrain("decode-1", 3)]
    world.step(DrainAnswer("decode-1", told=True, load=IDLE))
    world.tick(1.0)
    assert world.step(DrainAnswer("decode-1", told=True, load=Load(1, 0))) == [], "one was on its way"
    world.tick(1.0)
    assert world.step(DrainAnswer("decode-1", told=True, load=IDLE)) == []
    world.tick(1.4)
    assert world.step(DrainAnswer("decode-1", told=True, load=IDLE)) == []
    world.tick(0.4)
    assert world.step(DrainAnswer("decode-1", told=True, load=IDLE)) == [Terminate("decode-1")]
    assert world.states()["decode-1"] == "stopping"
    assert world.gone("decode-1") == [Forget("decode-1")]
    assert world.states() == {"prefill-0": "ready", "decode-0": "ready"}
    assert world.tick(5.0) == []


def test_a_prefill_stays_until_its_kv_was_taken() -> None:
    world = World(P0, Slot("prefill-1", "prefill"), D0)
    world.desire(P0, D0)
    for _ in range(10):
        world.tick(0.5)
        assert world.step(DrainAnswer("prefill-1", told=True, load=Load(0, 1))) == []
    assert world.drained("prefill-1") == [Terminate("prefill-1")]


def test_where_nobody_knows_what_is_held_a_lease_is_waited_for() -> None:
    world = World(P0, Slot("prefill-1", "prefill"), D0, D1)
    world.desire(P0, D0)
    began = world.now
    ended: dict[str, float] = {}
    while len(ended) < 2:
        world.tick(0.5)
        for name in ("prefill-1", "decode-1"):
            if world.step(DrainAnswer(name, told=True, load=Load(0, None))):
                ended[name] = world.now - began
    assert ended["decode-1"] < 3.0, "decode holds nothing for others"
    assert 30.0 <= ended["prefill-1"] < 32.0


def test_nobody_leaves_before_the_watchers_were_told() -> None:
    world = World(P0, D0, D1)
    world.desire(P0, D0)
    for _ in range(20):
        world.tick(1.0)
        assert world.step(DrainAnswer("decode-1", told=False, load=IDLE)) == []
    assert world.drained("decode-1") == [Terminate("decode-1")]


def test_a_drain_ends_at_its_limit_and_says_what_was_cut() -> None:
    world = World(P0, D0, D1)
    world.desire(P0, D0)
    world.tick(1.0)
    world.step(DrainAnswer("decode-1", told=True, load=Load(3, 2)))
    text = "decode-1 is stopped after 60 s (launcher.drain_s), which cuts 3 requests and the KV of 2 that nobody took"
    assert world.tick(59.0) == [Note("drain.cut", "decode-1", text), Kill("decode-1")]
    assert world.gone("decode-1") == [Forget("decode-1")]


def test_an_instance_that_ignores_its_stop_is_killed() -> None:
    world = World(P0, D0, D1)
    world.desire(P0, D0)
    world.drained("decode-1")
    assert world.tick(7.9) == []
    assert world.tick(0.2) == [Kill("decode-1")]


def test_one_that_has_not_served_yet_is_stopped_at_once() -> None:
    world = World(P0, D0)
    world.desire(P0, D0, D1)
    assert world.desire(P0, D0) == [Terminate("decode-1")]
    assert world.gone("decode-1") == [Forget("decode-1")]


def test_one_that_the_router_may_know_is_drained_though_we_have_not_heard_it() -> None:
    world = World(P0, D0)
    world.desire(P0, D0, D1)
    world.known("decode-1", "ready", "decode", 9)
    world.watched()
    assert world.desire(P0, D0) == [draining("decode-1")]


def test_one_that_dies_while_it_leaves_has_left() -> None:
    world = World(P0, D0, D1)
    world.desire(P0, D0)
    assert world.step(Exited("decode-1", -9)) == [Forget("decode-1")]


def test_one_that_waits_for_its_restart_just_goes() -> None:
    world = World(P0, D0, D1)
    world.step(Exited("decode-1", -9))
    assert world.desire(P0, D0) == [Forget("decode-1")]


def test_one_that_is_wanted_again_while_it_leaves_comes_back() -> None:
    world = World(P0, D0, D1)
    world.desire(P0, D0)
    assert world.desire(P0, D0, D1) == [], "there is no way back from draining"
    world.drained("decode-1")
    assert world.gone("decode-1") == [Start("decode-1")]


def test_the_stop_of_the_fleet_takes_those_that_leave_along() -> None:
    world = World(P0, D0, D1)
    world.desire(P0, D0)
    assert world.step(StopAsked()) == [Terminate("router")]
    assert world.step(DrainAnswer("decode-1", told=True, load=IDLE)) == []
    assert world.step(Exited("router", 0)) == [Terminate("prefill-0"), Terminate("decode-0"), Terminate("decode-1")]


# Roles -------------------------------------------------------------------------------------------------------------


def test_a_role_changes_without_a_restart() -> None:
    world = World(P0, D0, D1)
    assert world.desire(P0, D0, Slot("decode-1", "prefill")) == []
    assert world.fleet.children["decode-1"].role == "prefill"
    world.step(Exited("decode-1", 1))
    assert world.tick(1.0) == [Start("decode-1")]
    assert world.fleet.children["decode-1"].began_as == "prefill"


def test_where_roles_are_fixed_another_role_is_another_life() -> None:
    world = World(P0, D0, D1, rules=Rules(roles_fixed=True))
    assert world.desire(P0, D0, Slot("decode-1", "prefill")) == [draining("decode-1")]


# Restarts ----------------------------------------------------------------------------------------------------------


def again(slot: Slot, times: int = 1, *, rolling: bool = True) -> Slot:
    return Slot(slot.name, slot.role, times, rolling)


def test_a_restart_drains_stops_and_starts() -> None:
    world = World(P0, D0)
    assert world.desire(P0, again(D0, rolling=False)) == [draining("decode-0")]
    assert world.drained("decode-0") == [Terminate("decode-0")]
    assert world.gone("decode-0") == [Start("decode-0")]
    world.starts("decode-0")
    assert world.tick(9.0) == []
    assert world.fleet.children["decode-0"].ordered == 1


def test_a_rolling_restart_takes_one_after_the_other() -> None:
    slots = (P0, Slot("prefill-1", "prefill"), D0, D1)
    world = World(*slots)
    effects = world.desire(*map(again, slots))
    order = []
    while effects:
        (note,) = effects
        assert isinstance(note, Note)
        order.append(note.name)
        assert [state for name, state in world.states().items() if name != note.name] == ["ready"] * 3
        world.drained(note.name)
        assert world.gone(note.name) == [Start(note.name)]
        assert world.step(Answered(note.name, healthy=True)) == [], "not before the router may use it"
        effects = world.starts(note.name)
    assert order == [slot.name for slot in slots]
    assert set(world.states().values()) == {"ready"}


def test_a_rolling_restart_waits_for_those_that_died_and_stops_at_one_that_stays_away() -> None:
    world = World(P0, Slot("prefill-1", "prefill"), D0, D1, rules=Rules(restarts_max=1))
    world.step(Exited("prefill-1", 1))
    assert world.desire(P0, Slot("prefill-1", "prefill"), again(D0), again(D1)) == []
    world.tick(1.0)
    assert world.starts("prefill-1") == [draining("decode-0")]
    world.drained("decode-0")
    world.gone("decode-0")
    for _ in range(2):
        world.step(Exited("decode-0", 1))
        world.tick(1.0)
    assert world.states() == {
        "prefill-0": "ready", "prefill-1": "ready", "decode-0": "given_up", "decode-1": "ready",
    }  # fmt: skip
    assert world.tick(100.0) == []
    assert world.desire(P0, Slot("prefill-1", "prefill"), again(D0, 2), again(D1)) == [Start("decode-0")]
    assert world.starts("decode-0") == [draining("decode-1")]


def test_the_last_of_a_role_is_not_taken() -> None:
    world = World(P0, D0)
    assert world.desire(again(P0), again(D0)) == []
    assert world.tick(100.0) == []
    assert world.fleet.children["decode-0"].note == "waits with its restart until another 'decode' or 'both' serves"
    world.desire(again(P0), again(D0), D1)
    assert world.starts("decode-1") == [draining("decode-0")]


def test_a_replacement_serves_before_the_old_one_leaves() -> None:
    world = World(P0, D0)
    assert world.desire(P0, Slot("decode-1", "decode", replaces="decode-0")) == [Start("decode-1")]
    assert world.tick(1.0) == [Probe("decode-1")]
    assert world.step(Answered("decode-1", healthy=True)) == []
    assert world.starts("decode-1") == [draining("decode-0")]
    assert world.drained("decode-0") == [Terminate("decode-0")]
    assert world.gone("decode-0") == [Forget("decode-0")]
    assert world.states() == {"prefill-0": "ready", "decode-1": "ready"}


# GPUs --------------------------------------------------------------------------------------------------------------


def test_gpus_come_back_with_the_end_of_an_instance() -> None:
    world = World(P0, D0, gpus=Gpus(("0", "1")))
    assert world.fleet.gpus.held == {"prefill-0": ("0",), "decode-0": ("1",)}
    waits = Note("child.waits", "decode-1", "decode-1 waits for 1 GPUs, 0 are free")
    assert world.desire(P0, D0, D1) == [waits]
    assert world.tick(1.0) == [], "said once"
    world.step(Exited("prefill-0", 1))
    assert world.fleet.children["decode-1"].state == "starting", "who waits gets what is free"
    assert world.fleet.gpus.held == {"decode-0": ("1",), "decode-1": ("0",)}
    assert Note("child.waits", "prefill-0", "prefill-0 waits for 1 GPUs, 0 are free") in world.tick(1.0)
    world.desire(P0, D0)
    assert world.gone("decode-1") == [Forget("decode-1"), Start("prefill-0")]
    assert world.fleet.gpus.visible("prefill-0") == "0"


def test_an_instance_that_dies_at_start_twenty_times_holds_nothing() -> None:
    world = World(P0, D0, rules=Rules(restarts_max=19, restart_window_s=1e6), gpus=Gpus(("0", "1", "2")))
    world.desire(P0, D0, D1)
    starts = 1
    for _ in range(20):
        assert world.fleet.gpus.held["decode-1"] == ("2",)
        world.step(Exited("decode-1", 1, "no"))
        assert "decode-1" not in world.fleet.gpus.held
        starts += world.tick(30.0).count(Start("decode-1"))
    assert starts == 20
    assert world.states() == {"prefill-0": "ready", "decode-0": "ready", "decode-1": "given_up"}
    assert world.fleet.gpus.free == ("2",)
    assert world.desire(P0, D0) == [Forget("decode-1")]
