"""The router as a process: its settings, its way in and its way out."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from vllm_fleet.config.connector import bearer
from vllm_fleet.core.errors import ConfigError
from vllm_fleet.net.sockets import listen
from vllm_fleet.router.settings import read_settings
from vllm_fleet.wire.control import Member, Snapshot, encode

TOKEN = bytes(range(32))


def settings_file(folder: Path, **changed: Any) -> Path:
    token_file = folder / "token"
    token_file.write_text(TOKEN.hex())
    token_file.chmod(0o600)
    settings = {
        "fleet": "demo",
        "host": "127.0.0.1",
        "port": 0,
        "token_file": str(token_file),
        "controller": "http://127.0.0.1:9",
        "request_timeout_s": 5.0,
        **changed,
    }
    file = folder / "router.json"
    file.write_text(json.dumps(settings))
    return file


async def start(file: Path) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vllm_fleet.router", "--settings", str(file)), stderr=asyncio.subprocess.PIPE
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"port": 70000}, "port"),
        ({"unknown": 1}, "unknown"),
        ({"controller": "ftp://x"}, "controller"),
        ({"request_timeout_s": 0}, "request_timeout_s"),
        ({"handoff": "other"}, "handoff"),
    ],
)
def test_settings_are_strict(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_settings(settings_file(tmp_path, **changed))


def test_handoffs_are_streamed_unless_set_otherwise(tmp_path: Path) -> None:
    assert read_settings(settings_file(tmp_path)).handoff == "streamed"
    assert read_settings(settings_file(tmp_path, handoff="sequential")).handoff == "sequential"


def test_settings_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_settings(tmp_path / "none.json")


async def test_a_wrong_setting_ends_with_one_sentence(tmp_path: Path) -> None:
    process = await start(settings_file(tmp_path, host="0.0.0.0"))
    _, said = await process.communicate()
    assert process.returncode == 2
    assert said.decode().count("\n") == 1
    assert "every interface" in said.decode()


async def test_it_follows_the_controller_and_stops_when_told(tmp_path: Path) -> None:
    asked: list[str] = []

    async def watch(request: web.Request) -> web.StreamResponse:
        asked.append(request.headers.get("authorization", ""))
        answer = web.StreamResponse(headers={"content-type": "application/x-ndjson"})
        await answer.prepare(request)
        known = Member("d", "decode", "http://127.0.0.1:9", 1, "d-1", 1, "ready")
        await answer.write(encode(Snapshot("c", 1, (known,))) + b"\n")
        await asyncio.sleep(30)
        return answer

    app = web.Application()
    app.router.add_get("/v1/watch", watch)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    with listen("127.0.0.1", 0, setting="test") as listener:
        await web.SockSite(runner, listener).start()
        controller = f"http://127.0.0.1:{listener.getsockname()[1]}"
        process = await start(settings_file(tmp_path, controller=controller))
        try:
            assert process.stderr is not None
            line = (await process.stderr.readuntil(b"\n")).decode()
            assert "router.start" in line
            url = json.loads(line.partition("url=")[2].partition(" ")[0])
            async with aiohttp.ClientSession() as http:
                for _ in range(100):
                    async with http.get(f"{url}/health") as answer:
                        if answer.status == 200:
                            break
                    await asyncio.sleep(0.02)
                assert answer.status == 200
            assert asked == [f"Bearer {bearer(TOKEN)}"]
            process.send_signal(signal.SIGTERM)
            _, rest = await process.communicate()
            assert process.returncode == 0
            assert "router.stop" in rest.decode()
            assert "Traceback" not in rest.decode()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            await runner.cleanup()
