"""Members and watchers in the simulation. They see the controller only through encoded messages."""

from __future__ import annotations

import random
from collections.abc import Callable

from tests.sim.clockwork import Clockwork, Network
from tests.sim.controller_sim import RULES, Request, SimController
from vllm_fleet.net.watch import Follower
from vllm_fleet.wire import control


class SimLife:
    """One life of an instance: registers, sends heartbeats, until it is killed. It behaves as the connector's agent."""

    def __init__(self, world: Clockwork, network: Network, controller: SimController, name: str, number: int) -> None:
        self.name, self.incarnation, self.url = name, f"{name}-life-{number}", f"http://10.0.0.1:{number}"
        self.alive = True
        self.paused_until = self.mute_until = self.deaf_until = 0.0
        self.clock_rate = 1.0
        self.generation: int | None = None
        self.left = False
        self._world, self._network, self._controller = world, network, controller
        self.ready_at = world.now + 2.0
        self._beat_number = 0
        self._beat_in(0.0)

    @property
    def paused(self) -> bool:
        return self._world.now < self.paused_until

    def leave(self) -> None:
        """Stop as told: say so, and end."""
        if self.generation is not None:
            self._ask(Request("deregister", self.name, generation=self.generation))
        self.alive = False
        self.left = True

    def step_clock(self, seconds: float) -> None:
        """Its clock is set: the next heartbeat comes so much earlier, or later."""
        self._beat_in(max(0.0, -seconds))

    def _beat_in(self, seconds: float) -> None:
        self._beat_number += 1
        number = self._beat_number
        self._world.at(seconds, lambda: self._beat() if number == self._beat_number else None)

    def _beat(self) -> None:
        if not self.alive:
            return
        if self.paused:
            self._beat_in(self.paused_until - self._world.now)
            return
        state: control.ReportedState = "ready" if self._world.now >= self.ready_at else "starting"
        if self.generation is None:
            body = control.encode(control.Register(self.name, "both", self.url, 1, self.incarnation, state))
            self._ask(Request("register", self.name, body))
        else:
            self._ask(Request("heartbeat", self.name, control.encode(control.Heartbeat(self.generation, state))))
        self._beat_in(RULES.heartbeat_s / self.clock_rate)

    def _ask(self, request: Request) -> None:
        def answer(status: int, body: bytes) -> None:
            self._network.send(lambda: self._take(request, status, body), "down")

        if self._world.now >= self.mute_until:
            self._network.send(lambda: self._controller.receive(request, answer), "up")

    def _take(self, request: Request, status: int, body: bytes) -> None:
        if not self.alive or self.paused or self._world.now < self.deaf_until:
            return
        if request.method == "register" and status == 200:
            self.generation = max(self.generation or 0, control.decode_registered(body).generation)
        elif request.method == "heartbeat" and status in (404, 409):
            refused = control.decode_heartbeat(request.body).generation
            self.generation = None if refused == self.generation else self.generation


class SimWatcher:
    """Follows the fleet with the real Follower; its stream keeps order but breaks. Checks each event as it comes."""

    def __init__(self, world: Clockwork, controller: SimController, rng: random.Random) -> None:
        self.members: dict[str, control.Member] = {}
        self.desired = control.Desired()
        self.controller = ""
        self.revision = -1
        self.snapshots = self.changes = self.breaks = 0
        self.break_chance = 0.0
        self.deaf_until = 0.0
        """Until then nothing reaches it: its streams break, new ones cannot be opened."""
        self._world, self._controller, self._rng = world, controller, rng
        self._follower = Follower(self._on_event)
        self._stream = 0
        self._connect()

    def break_stream(self) -> None:
        """The connection is gone; what was under way on it is lost."""
        self._stream += 1
        self.breaks += 1
        self._world.at(self._rng.uniform(0.05, 2.0), self._connect)

    def _connect(self) -> None:
        resume = self._follower.resume()
        since = resume.get("since")
        send = self._sender(self._stream)
        after = None if since is None else int(since)
        if self._world.now < self.deaf_until or not self._controller.watch(after, resume.get("controller"), send):
            self._world.at(self._rng.uniform(0.05, 2.0), self._connect)
            return
        stream = self._stream
        self._world.at(1.0, lambda: self._still_here(send, stream))

    def _sender(self, stream: int) -> Callable[[bytes], None]:
        arrival = 0.0

        def send(line: bytes) -> None:
            nonlocal arrival
            arrival = max(arrival, self._world.now + self._rng.uniform(0.001, 0.05))
            self._world.at_time(arrival, lambda: self._take(stream, line))

        return send

    def _still_here(self, send: Callable[[bytes], None], stream: int) -> None:
        """Once a second: notice a controller that died, or lose the connection."""
        deaf = self._world.now < self.deaf_until
        dead = deaf or stream != self._stream or send not in self._controller.streams
        if dead or self._rng.random() < self.break_chance:
            if send in self._controller.streams:
                self._controller.streams.remove(send)
            self.break_stream()
            return
        self._world.at(1.0, lambda: self._still_here(send, stream))

    def _take(self, stream: int, line: bytes) -> None:
        if stream != self._stream:
            return
        if self._world.now < self.deaf_until:  # what comes later on this stream cannot follow what was lost
            self._stream += 1
            return
        event = control.decode_watch_event(line)
        if isinstance(event, control.Change):
            assert event.revision == self.revision + 1, f"revision {event.revision} came after {self.revision}"
        elif isinstance(event, control.Snapshot) and event.controller == self.controller:
            assert event.revision >= self.revision, f"snapshot {event.revision} came after {self.revision}"
        self._follower.take(event)

    def _on_event(self, event: control.News) -> None:
        self.revision = event.revision
        if isinstance(event, control.Snapshot):
            self.snapshots += 1
            self.controller = event.controller
            self.members = {member.name: member for member in event.members}
            self.desired = event.desired
            return
        self.changes += 1
        if isinstance(event, control.Desired):
            self.desired = event
            return
        known = self.members.get(event.member.name)
        assert known is None or event.member.generation >= known.generation, "a member went back to an older life"
        if event.member.state == "gone":
            self.members.pop(event.member.name, None)
        else:
            self.members[event.member.name] = event.member
