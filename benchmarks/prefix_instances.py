"""Mock instances for benchmarks.prefix_trace: HTTP like vLLM's, a cache like vLLM's, and its KV events.

An instance computes what is not cached, prompt after prompt, and writes answers beside that. Tokens are 4 bytes.
"""

from __future__ import annotations

import argparse
import asyncio
from collections import deque
from pathlib import Path
from typing import Any

import msgspec
import uvloop
import xxhash
import zmq
import zmq.asyncio
from aiohttp import web

from vllm_fleet.bench.mock_cache import MockCache
from vllm_fleet.core import limits
from vllm_fleet.net.sockets import listen
from vllm_fleet.router.prefix.events import END
from vllm_fleet.router.prefix.subscriber import endpoints

TOKEN_BYTES = 4
BLOCK_TOKENS = 16


def answer_text(prompt: str, tokens: int) -> str:
    """What an instance answers: the same for the same prompt, and unlike other answers."""
    seed = f"{hash_word(prompt)} "
    return (seed * (tokens * TOKEN_BYTES // len(seed) + 1))[: tokens * TOKEN_BYTES]


def hash_word(text: str) -> str:
    """A word that stands for a text."""
    return xxhash.xxh3_64_hexdigest(text.encode())


class Instance:
    """One mock instance."""

    def __init__(self, name: str, blocks: int, prefill_s: float, decode_s: float, context: zmq.asyncio.Context) -> None:
        self.name, self._blocks = name, blocks
        self._prefill_s, self._decode_s = prefill_s, decode_s
        self._cache = MockCache(blocks, BLOCK_TOKENS, TOKEN_BYTES)
        self._engine = asyncio.Lock()
        self._pub, self._replay = context.socket(zmq.PUB), context.socket(zmq.ROUTER)
        self._sequence = 0
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=limits.KV_EVENT_BUFFER_STEPS)
        self.running = self.waiting = 0
        self.facts = {"prompt_tokens": 0, "cached_tokens": 0, "requests": 0, "running_max": 0}

    def bind(self, folder: str) -> None:
        """Publish in ``folder``."""
        publish, replay = endpoints(folder, self.name)
        Path(publish.removeprefix("ipc://")).parent.mkdir(parents=True, exist_ok=True)
        self._pub.bind(publish)
        self._replay.bind(replay)

    async def answer_replays(self) -> None:
        """Say again what was published, for ever."""
        while True:
            client, _, start = await self._replay.recv_multipart()
            for number, payload in list(self._kept):
                if number >= int.from_bytes(start, "big"):
                    await self._replay.send_multipart([client, b"", b"", number.to_bytes(8, "big"), payload])
            await self._replay.send_multipart([client, b"", b"", END, b""])

    async def _publish(self) -> None:
        if not self._cache.events:
            return
        payload = msgspec.msgpack.encode([0.0, self._cache.events, 0])
        self._cache.events.clear()
        number, self._sequence = self._sequence, self._sequence + 1
        self._kept.append((number, payload))
        await self._pub.send_multipart([b"", number.to_bytes(8, "big"), payload])

    async def generate(self, request: web.Request) -> web.Response:
        """One completion."""
        body = await request.json()
        prompt, tokens = body["prompt"], int(body.get("max_tokens", 16))
        self.running += 1
        self.facts["running_max"] = max(self.facts["running_max"], self.running)
        try:
            async with self._engine:
                held = self._cache.begin(prompt.encode(), request.headers.get("x-session-id"))
                count = len(prompt) // TOKEN_BYTES
                cached = min(held.hit * BLOCK_TOKENS, count)
                await asyncio.sleep((count - cached) * self._prefill_s)
                await self._publish()
            self.facts["prompt_tokens"] += count
            self.facts["cached_tokens"] += cached
            self.facts["requests"] += 1
            text = answer_text(prompt, tokens)
            await asyncio.sleep(tokens * self._decode_s)
            self._cache.grow(held, (prompt + text).encode())
            self._cache.end(held)
            await self._publish()
        finally:
            self.running -= 1
        return web.json_response(
            {
                "id": "cmpl-mock",
                "object": "text_completion",
                "created": 0,
                "model": "mock",
                "choices": [{"index": 0, "text": text, "finish_reason": "length", "logprobs": None}],
                "usage": {"prompt_tokens": count, "completion_tokens": tokens, "total_tokens": count + tokens},
            },
            headers={"x-instance": self.name, "x-cached": str(cached)},
        )

    async def render(self, request: web.Request) -> web.Response:
        """The prompt's tokens, as vLLM 0.32 tells them: vllm-router's cache_aware asks for them before it chooses."""
        body = await request.json()
        text = body["prompt"].encode()
        ends = range(TOKEN_BYTES, len(text) + 1, TOKEN_BYTES)
        tokens = [int.from_bytes(text[end - TOKEN_BYTES : end], "little") for end in ends]
        params = {"max_tokens": body.get("max_tokens", 16)}
        return web.json_response(
            [{"request_id": "r", "token_ids": tokens, "features": None, "sampling_params": params, "model": "mock"}]
        )

    async def metrics(self, request: web.Request) -> web.Response:
        """What routers read."""
        return web.Response(
            text=f'vllm:num_requests_running{{engine="0"}} {self.running}\n'
            f'vllm:num_requests_waiting{{engine="0"}} 0\nvllm:kv_cache_usage_perc{{engine="0"}} {self._cache.used}\n'
            f'vllm:cache_config_info{{block_size="{BLOCK_TOKENS}",num_gpu_blocks="{self._blocks}"}} 1.0\n'
        )

    async def reset(self, request: web.Request) -> web.Response:
        """Begin anew with an empty cache; answers what happened so far."""
        facts = dict(self.facts)
        self.facts = dict.fromkeys(self.facts, 0)
        self._cache.clear()
        await self._publish()
        return web.json_response(facts)


def _app(instance: Instance) -> web.Application:
    async def ok(request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def models(request: web.Request) -> web.Response:
        found: dict[str, Any] = {"object": "list", "data": [{"id": "mock", "object": "model", "owned_by": "mock"}]}
        return web.json_response(found)

    app = web.Application(client_max_size=1 << 26)
    app.router.add_post("/v1/completions", instance.generate)
    app.router.add_post("/v1/completions/render", instance.render)
    app.router.add_get("/metrics", instance.metrics)
    app.router.add_post("/reset", instance.reset)
    app.router.add_get("/health", ok)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/get_model_info", ok)
    app.router.add_get("/get_server_info", ok)
    return app


async def serve(ports: list[int], folder: str, blocks: int, prefill_s: float, decode_s: float) -> None:
    """Serve until killed."""
    context = zmq.asyncio.Context()
    async with asyncio.TaskGroup() as group:
        for number, port in enumerate(ports):
            instance = Instance(f"both-{number}", blocks, prefill_s, decode_s, context)
            instance.bind(folder)
            group.create_task(instance.answer_replays())
            runner = web.AppRunner(_app(instance), access_log=None)
            await runner.setup()
            await web.SockSite(runner, listen("127.0.0.1", port, setting="mock")).start()
        print("ready", flush=True)


def main() -> None:
    """As told by benchmarks.prefix_trace."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ports", type=int, nargs="+", required=True)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--prefill-s", type=float, required=True)
    parser.add_argument("--decode-s", type=float, required=True)
    given = parser.parse_args()
    uvloop.run(serve(given.ports, given.folder, given.blocks, given.prefill_s, given.decode_s))


if __name__ == "__main__":
    main()
