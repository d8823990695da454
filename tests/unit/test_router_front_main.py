"""The front's settings through real processes: one router, and one of two workers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.unit.mock_instance import until
from tests.unit.test_router_main import settings_file, start
from vllm_fleet.config.keys import add_key


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in file.read_text().splitlines()] if file.exists() else []


@contextlib.asynccontextmanager
async def router(file: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A router that serves, and its URL; it has to end in order when it is told to."""
    process = await start(file)
    assert process.stderr is not None
    try:
        while True:
            said = (await process.stderr.readline()).decode()
            assert said, "it has ended"
            if found := re.search(r'router\.start url="([^"]+)"', said):
                break
        yield process, found[1]
        process.terminate()
        await process.stderr.read()
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize("workers", [1, 2])
async def test_keys_log_and_the_operators_address(tmp_path: Path, workers: int) -> None:
    key, log, moved = add_key(tmp_path / "keys", "alice"), tmp_path / "log", tmp_path / "log.1"
    # A port of its own is taken for a moment: settings name it, as the launcher's do.
    from vllm_fleet.net.sockets import free_port

    admin = free_port("127.0.0.1")
    front = {"keys_file": str(tmp_path / "keys"), "access_log": str(log), "admin_port": admin}
    file = settings_file(tmp_path, front=front, workers=workers, stop_s=0.1)
    async with router(file) as (process, url), aiohttp.ClientSession() as http:

        async def ask(base: str, path: str, method: str = "GET", given: str = "") -> int:
            headers = {"authorization": f"Bearer {given}", "connection": "close"}
            async with http.request(method, base + path, headers=headers) as answer:
                return answer.status

        operators = f"http://127.0.0.1:{admin}"
        assert await ask(operators, "/metrics") == 200
        assert await ask(url, "/metrics", given=key) == 404
        statuses = [await ask(url, "/v1/models", given=given) for given in (key, "wrong", key)]
        assert statuses == [503, 401, 503]  # no instance is there
        await until(lambda: len(lines(log)) == 4)
        log.rename(moved)
        process.send_signal(signal.SIGHUP)
        await until(log.exists)
        await ask(url, "/v1/models", given=key)
        async with http.get(f"{operators}/metrics") as answer:
            page = await answer.text()
        assert 'vllm_fleet_router_tenant_requests_total{tenant="alice"} 4.0' in page
    told = lines(moved) + lines(log)
    assert sorted((each.get("tenant", ""), each["status"]) for each in told) == [
        ("", 401), ("alice", 404), ("alice", 503), ("alice", 503), ("alice", 503),
    ]  # fmt: skip


async def test_a_file_that_cannot_be_used_stops_the_start(tmp_path: Path) -> None:
    process = await start(settings_file(tmp_path, front={"keys_file": str(tmp_path / "none")}))
    _, said = await process.communicate()
    assert process.returncode == 2
    assert said.decode() == f"router.keys_file: cannot read {tmp_path}/none: No such file or directory\n"
