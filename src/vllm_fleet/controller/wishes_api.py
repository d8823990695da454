"""The controller's calls about what the fleet is to be. The handlers' docstrings are the API's documentation."""

from __future__ import annotations

from vllm_fleet.controller import wishes
from vllm_fleet.controller.engine import Engine
from vllm_fleet.controller.exchange import answer_json
from vllm_fleet.controller.routes import Route, Taking
from vllm_fleet.controller.turns import Decide
from vllm_fleet.net.http.messages import Answer, Handled, Request
from vllm_fleet.wire import control


class WishesApi:
    """Desired state, and leaving."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def routes(self) -> list[Route]:
        return [
            Route("GET", "/v1/desired", self.desired, {200: control.Desired}),
            Route("PUT", "/v1/desired", Taking(control.Desired, self.desire), {200: control.Desired}),
            Route(
                "POST", "/v1/members/{name}/drain", Taking(control.Drain, self.drain), {200: control.Draining}
            ),
        ]  # fmt: skip

    def desired(self, request: Request) -> Handled:
        """What the fleet is to be, instance by instance; revision 0: nobody has said."""
        self._engine.check_leads()
        return answer_json(self._engine.state.desired)

    def desire(self, request: Request, message: control.Desired) -> Handled:
        """Say what the fleet is to be; `revision`: of what it was to be when you looked. The same again gets the same
        answer.

        400: an instance is named twice, or an instance cannot change its role. 409: somebody else came first.
        """
        return self._turn(lambda state, now: wishes.on_desire(state, message, now))

    def drain(self, request: Request, message: control.Drain) -> Handled:
        """Have nothing new sent to this life of an instance, for good; asked again, how busy it is.

        404: it is not known. 409: a later life holds the name.
        """
        name = request.params["name"]
        return self._turn(lambda state, now: wishes.on_drain(state, name, message, now))

    async def _turn(self, decide: Decide) -> Answer:
        reply = await self._engine.submit(decide)
        return answer_json(reply.body, reply.status)
