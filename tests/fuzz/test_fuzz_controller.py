"""Damaged requests through everything of the controller that reads them: parser, guard, routes, handlers."""

from __future__ import annotations

import asyncio
import inspect
import random

from tests.fuzz.targets import mutate
from vllm_fleet.controller import journal
from vllm_fleet.controller.engine import Engine
from vllm_fleet.controller.exchange import refusal
from vllm_fleet.controller.http import RULES
from vllm_fleet.controller.server import ControllerServer
from vllm_fleet.controller.state import FleetState, Rules
from vllm_fleet.controller.stores.memory import MemoryStore
from vllm_fleet.core import limits
from vllm_fleet.core.env import RealEnv
from vllm_fleet.net.http.messages import Answer
from vllm_fleet.net.http.reader import Heads, RequestReader
from vllm_fleet.wire import control

HELLO = control.encode(control.Register("a", "both", "http://127.0.0.1:1", 7, "life", "ready", {"model": "m"}))
ROUNDS = 4000


def requests() -> list[bytes]:
    """One valid request of each kind."""
    bodies = [
        ("POST", "/v1/members", HELLO),
        ("POST", "/v1/members/a/heartbeat", b'{"generation":1,"state":"ready","load":{"requests":1,"held":2}}'),
        ("POST", "/v1/members/a/drain", b'{"generation":1}'),
        ("PUT", "/v1/desired", b'{"revision":0,"instances":[{"name":"a","role":"both"}]}'),
        ("POST", "/v1/groups/g/meet", b"{}"),
        ("DELETE", "/v1/members/a?generation=1", b""),
        ("GET", "/v1/watch?since=1&controller=%6a", b""),
        ("GET", "/v1/members", b""),
        ("GET", "/health", b""),
        ("GET", "/openapi.json", b""),
    ]
    made = []
    for method, target, body in bodies:
        head = f"{method} {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer token\r\n"
        made.append(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        made.append(f"{head}Transfer-Encoding: chunked\r\n\r\n{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n")
    return made


async def test_damaged_requests_get_typed_answers() -> None:
    store, state = MemoryStore(), FleetState("j", Rules())
    store.rewrite(journal.to_records(state))
    engine = Engine(state, store, RealEnv())
    server = ControllerServer(engine, "token", "127.0.0.1", RealEnv())
    running = asyncio.create_task(engine.run())
    rng, samples = random.Random(7), requests()
    seen: dict[int, int] = {}
    heads = Heads()
    for number in range(ROUNDS):
        reader = RequestReader(RULES, server.front.refuse, refusal, "peer", heads)
        damaged = samples[number] if number < len(samples) else mutate(rng, samples)
        for start in range(0, len(damaged), 50):
            reader.feed(damaged[start : start + 50])
        answers = [] if reader.refused is None else [reader.refused]
        while reader.requests:
            handled = server.front.handle(reader.requests.popleft())
            if inspect.iscoroutine(handled):
                handled = await handled
            if isinstance(handled, Answer):
                answers.append(handled)
            else:
                handled.on_closed()  # type: ignore[union-attr]
        for answer in answers:
            seen[answer.status] = seen.get(answer.status, 0) + 1
            if answer.status >= 400:
                assert control.decode_error(answer.body).code != "bug"
    await server.close()
    await engine.stop()
    await running
    assert set(seen) >= {200, 204, 400, 401, 403, 404, 405}, seen
    assert 500 not in seen
    assert len(engine.state.members) <= limits.MEMBERS_MAX
