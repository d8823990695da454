"""The controller's calls about members. Knows no sockets: requests in, answers out; wire/control.py has the messages.

The handlers' docstrings are the API's documentation (openapi.py).
"""

from __future__ import annotations

from msgspec import Struct

from vllm_fleet.controller import reactor
from vllm_fleet.controller.effects import Effect
from vllm_fleet.controller.engine import Engine
from vllm_fleet.controller.exchange import answer_json
from vllm_fleet.controller.metrics import fleet_metrics
from vllm_fleet.controller.routes import Query, Route, Taking
from vllm_fleet.controller.state import FleetState
from vllm_fleet.controller.turns import Decide
from vllm_fleet.controller.watchers import encode_line, first_events
from vllm_fleet.core import limits
from vllm_fleet.core.errors import BadRequest
from vllm_fleet.net.http.messages import Answer, Handled, Request
from vllm_fleet.wire import control
from vllm_fleet.wire.names import Count, Id

PLAIN_TEXT = "text/plain; charset=utf-8"


class Health(Struct, frozen=True):
    """The answer of /health. ``durable`` false: joins wait until the journal can be written again."""

    status: str
    durable: bool


class MembersApi:
    """Registration, heartbeats, watching, health."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def routes(self) -> list[Route]:
        generation = Query("generation", Count, "which life leaves", required=True)
        since = Query("since", Count, "changes after this revision are wanted; without it, a Snapshot")
        journal = Query("controller", Id, "the `controller` of the Snapshot that `since` was counted from")
        return [
            Route("POST", "/v1/members", Taking(control.Register, self.register), {200: control.Registered}),
            Route("GET", "/v1/members", self.members, {200: control.Snapshot}),
            Route("DELETE", "/v1/members/{name}", self.deregister, {204: None}, (generation,)),
            Route(
                "POST",
                "/v1/members/{name}/heartbeat",
                Taking(control.Heartbeat, self.heartbeat),
                {200: control.HeartbeatAck},
            ),
            Route("GET", "/v1/watch", self.watch, {200: control.WatchEvent}, (since, journal), lines=True),
            Route("GET", "/metrics", self.metrics, {200: PLAIN_TEXT}),
            Route("GET", "/health", self.health, {200: Health}, needs_token=False),
        ]

    def register(self, request: Request, message: control.Register) -> Handled:
        """Announce a life of an instance. The same life again gets the same answer; a later one a larger generation.

        409: another life holds the name or the URL, or this one has left.
        """
        fingerprint_len = len(control.encode(message.fingerprint))
        if fingerprint_len > limits.FINGERPRINT_LEN_MAX:
            raise BadRequest(
                f"fingerprint is {fingerprint_len} bytes long, at most {limits.FINGERPRINT_LEN_MAX} may be"
            )
        return self._turn(lambda state, now: reactor.on_register(state, message, now))

    def heartbeat(self, request: Request, message: control.Heartbeat) -> Handled:
        """Say that an instance lives, and in which state.

        404: it is not known (register again). 409: a later life holds the name.
        """
        name = request.params["name"]

        def decide(state: FleetState, now: float) -> list[Effect]:
            return reactor.on_heartbeat(state, name, message, now)

        reply = self._engine.attempt(decide)  # nearly all change nothing, and a large fleet sends thousands a second
        return self._turn(decide) if reply is None else answer_json(reply.body, reply.status)

    def deregister(self, request: Request) -> Handled:
        """Leave the fleet; the same answer when it has left already. 409: another life holds the name."""
        name, generation = request.params["name"], request.count("generation")
        if generation is None:
            raise BadRequest("generation: this parameter is needed")
        return self._turn(lambda state, now: reactor.on_deregister(state, name, generation, now))

    def members(self, request: Request) -> Handled:
        """The whole fleet at one revision."""
        self._engine.check_leads()
        return answer_json(self._engine.state.snapshot())

    def watch(self, request: Request) -> Handled:
        """Follow the fleet: what changed after `since`, or a Snapshot where that is not known any more, then each
        change as it happens; a line comes at least every second. Who does not keep up is cut off and may resume.
        """
        self._engine.check_leads()
        state = self._engine.state
        first = first_events(state, request.count("since"), request.query("controller"))
        lines = b"".join(encode_line(event) for event in first)
        return self._engine.watchers.add(lines or encode_line(control.StillHere(state.revision)))

    async def metrics(self, request: Request) -> Answer:
        """The connector's counters summed over all instances, as Prometheus text."""
        self._engine.check_leads()
        page = await fleet_metrics(self._engine.state.snapshot().members)
        return Answer(200, page.encode(), PLAIN_TEXT)

    def health(self, request: Request) -> Handled:
        """Whether the controller works, and whether it can save."""
        durable = self._engine.durable
        return answer_json(Health("ok" if durable else "not_durable", durable))

    async def _turn(self, decide: Decide) -> Answer:
        reply = await self._engine.submit(decide)
        return answer_json(reply.body, reply.status)
