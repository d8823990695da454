"""A whole router in this process: wrong requests, its other pages, and its audit."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator

import pytest

from tests.unit.mock_instance import JSON, fleet, pair, until
from vllm_fleet.core import limits

# Requests that are wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b'{"a":"\xff"}'])
async def test_bad_json(raw: bytes) -> None:
    async with fleet(*pair()) as up:
        status, body, headers = await up.post(raw)
        assert (status, body["error"]["code"]) == (400, "invalid_json")
        assert body["error"].keys() == {"message", "type", "param", "code"}
        assert len(headers["x-request-id"]) == 32


async def test_another_media_type_or_encoding() -> None:
    async with fleet(*pair()) as up:
        assert (await up.post(b"{}", **{"content-type": "text/plain"}))[0] == 415
        assert (await up.post(b"{}", **{"content-encoding": "gzip"}))[0] == 415


async def test_a_body_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REQUEST_BODY_BYTES_MAX", 1000)

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * 100

    async with fleet(*pair()) as up:
        status, body, _ = await up.post({"prompt": "x" * 1000})
        assert (status, body["error"]["code"]) == (413, "request_too_large")
        async with up.http.post(f"{up.router.url}/v1/completions", data=pieces(), headers=JSON) as answer:
            assert answer.status == 413


async def test_headers_that_are_too_large() -> None:
    async with fleet(*pair()) as up:
        headers = {f"x-{number}": "y" * 7000 for number in range(6)}
        assert (await up.post({"prompt": "hi"}, **headers))[0] == 431


async def test_too_many_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REQUESTS_MAX", 0)
    async with fleet(*pair()) as up:
        status, body, headers = await up.post({"prompt": "hi"})
        assert (status, body["error"]["code"], headers["retry-after"]) == (503, "overloaded", "1")


@pytest.mark.parametrize(
    "path", ["/v1/embeddings", "/", "/v1/completions/", "/metrics/", "//health", "/update_weights"]
)
async def test_unknown_paths(path: str) -> None:
    async with fleet(*pair()) as up:
        status, text, _ = await up.get(path)
        assert (status, json.loads(text)["error"]["code"]) == (404, "unknown_path")


async def test_wrong_methods() -> None:
    async with fleet(*pair()) as up:
        status, text, headers = await up.get("/v1/completions")
        assert (status, json.loads(text)["error"]["code"], headers["allow"]) == (405, "wrong_method", "POST")
        assert (await up.get("/health", "DELETE"))[0] == 405


async def test_nobody_is_ready() -> None:
    async with fleet() as up:
        status, body, headers = await up.post({"prompt": "hi"})
        assert (status, body["error"]["code"]) == (503, "no_ready_instance")
        assert int(headers["retry-after"]) > 0
        status, text, _ = await up.get("/health")
        assert (status, json.loads(text)["missing"]) == (503, "a ready instance")


# Other pages -------------------------------------------------------------------------------------------------------


async def test_health() -> None:
    async with fleet(*pair()) as up:
        status, text, _ = await up.get("/health")
        assert (status, json.loads(text)) == (200, {"status": "ok", "prefill": 1, "decode": 1, "both": 0})


async def test_models_are_asked_once() -> None:
    p, d = pair()
    async with fleet(p, d) as up:
        for _ in range(3):
            status, text, _ = await up.get("/v1/models")
            assert (status, json.loads(text)["data"][0]["id"]) == (200, "m")
        assert p.models_asked + d.models_asked == 1


async def test_metrics() -> None:
    async with fleet(*pair()) as up:
        await up.post({"prompt": "hi"})
        status, text, headers = await up.get("/metrics")
        assert status == 200
        assert headers["content-type"].startswith("text/plain")
        assert 'vllm_fleet_router_instances{role="prefill",state="ready"} 1.0' in text
        assert 'vllm_fleet_router_time_to_first_byte_seconds_count{route="/v1/completions"} 1.0' in text


# The audit ---------------------------------------------------------------------------------------------------------


async def test_handoffs_in_name_only_are_found(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(limits, "AUDIT_POLL_S", 0.05)
    monkeypatch.setattr(limits, "AUDIT_SETTLE_S", 0.2)
    p, d = pair()
    async with fleet(p, d) as up:
        await asyncio.sleep(0.2)
        with caplog.at_level(logging.WARNING, "vllm_fleet"):
            await up.post({"prompt": "hi"})
            await until(lambda: up.metric('vllm_fleet_router_handoffs_without_bytes{decode="d"}') == 1)
        said = [record.getMessage() for record in caplog.records if "handoff.no_bytes" in record.getMessage()]
        assert len(said) == 1
        assert 'decode="d"' in said[0]
        assert "connector_metrics=false" in said[0]


async def test_handoffs_that_loaded_are_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "AUDIT_POLL_S", 0.05)
    monkeypatch.setattr(limits, "AUDIT_SETTLE_S", 0.2)
    p, d = pair()
    async with fleet(p, d) as up:
        await asyncio.sleep(0.2)
        await up.stream({"prompt": "hi"})
        d.metrics_page = 'vllm:fleet_handoffs_total{outcome="loaded"} 1\nvllm:fleet_handoff_bytes_total 4096\n'
        await until(lambda: up.metric('vllm_fleet_router_handoff_bytes{decode="d"}') == 4096)
        await asyncio.sleep(0.3)
        assert up.metric('vllm_fleet_router_handoffs_without_bytes{decode="d"}') == 0
