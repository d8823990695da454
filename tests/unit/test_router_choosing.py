"""Policies inside a running router: labels out, events in, loads read, handoffs skipped."""

from __future__ import annotations

from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from tests.unit.mock_instance import MockInstance, fleet, until
from vllm_fleet.router.policies.settings import PolicySettings
from vllm_fleet.router.prefix.events import END
from vllm_fleet.router.prefix.subscriber import endpoints

LONG = "a long prompt that others may begin with as well " * 20


async def test_the_events_of_a_labelled_request_are_found(tmp_path: Path) -> None:
    instance, context = MockInstance("b", "both"), zmq.asyncio.Context()
    publish, replay = endpoints(str(tmp_path), "b")
    publisher, old = context.socket(zmq.XPUB), context.socket(zmq.ROUTER)
    publisher.bind(publish)
    old.bind(replay)
    policy = PolicySettings(decode="prefix", kv_events=str(tmp_path))
    try:
        async with fleet(instance, policy=policy) as running:
            assert await publisher.recv() == b"\x01", "the router listens"
            client, _, start = await old.recv_multipart()
            assert int.from_bytes(start, "big") == 0, "all that was said before is asked for"
            await old.send_multipart([client, b"", b"", END, b""])
            own = {"prompt": LONG, "session_id": "mine", "vllm_xargs": {"session_id": "mine", "a": 1}}
            await running.post(own, **{"x-session-id": "mine"})
            seen = instance.seen[-1]
            label = seen.headers["x-session-id"]
            assert label != "mine"
            assert "session_id" not in seen.body
            assert seen.body["vllm_xargs"] == {"a": 1}
            stored = {"type": "BlockStored", "block_hashes": [1, 2], "parent_block_hash": None, "block_size": 16}
            payload = msgspec.msgpack.encode([0.0, [{**stored, "session_id": label}], 0])
            await publisher.send_multipart([b"", (0).to_bytes(8, "big"), payload])
            await until(lambda: running.metric("vllm_fleet_router_prefix_learnt_total") == 1)
            assert running.metric('vllm_fleet_router_prefix_blocks{instance="b"}') == 2
    finally:
        context.destroy(linger=0)


async def test_without_events_a_clients_session_reaches_its_instance() -> None:
    instance = MockInstance("b", "both")
    async with fleet(instance, policy=PolicySettings(decode="prefix")) as running:
        await running.post({"prompt": LONG}, **{"x-session-id": "mine"})
        assert instance.seen[-1].headers["x-session-id"] == "mine"


async def test_others_requests_are_read_and_count() -> None:
    busy, idle = MockInstance("a", "both"), MockInstance("b", "both")
    busy.metrics_page = 'vllm:num_requests_running{engine="0"} 9\n'
    async with fleet(busy, idle) as running:

        async def asked() -> str:
            _, _, headers = await running.post({"prompt": "x"})
            return headers["x-fleet-decode"]

        async def settled() -> bool:
            return [await asked() for _ in range(3)] == ["b"] * 3

        while not await settled():
            pass


async def test_a_short_prompt_and_a_held_one_skip_prefill() -> None:
    p, d = MockInstance("p", "prefill"), MockInstance("d", "decode")
    policy = PolicySettings(decode="prefix", handoff_min_tokens=20, handoff_cached_share=0.9)
    async with fleet(p, d, policy=policy) as running:
        found = [
            (await running.post({"prompt": each}))[2]["x-fleet-handoff"] for each in ("short", LONG, LONG + "more")
        ]
    assert found == ["skipped:short", "handed_off", "skipped:cached"]
    assert len(p.seen) == 1


async def test_sessions_by_header() -> None:
    instances = [MockInstance(name, "both") for name in "abcd"]
    async with fleet(*instances, policy=PolicySettings(decode="session", session_header="x-user")) as running:
        for turn in range(3):
            for user in range(12):
                await running.post({"prompt": f"{turn}"}, **{"x-user": f"u{user}"})
    counts = sorted(len(instance.seen) for instance in instances)
    assert all(count % 3 == 0 for count in counts), "every user's three turns were answered by one instance"
    assert counts[-1] < 36
