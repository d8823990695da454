"""Two API keys ask real instances the same: neither learns by its time that the other has asked (trust test 32)."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MODEL, RunningFleet, SharedFleets
from tests.faults.handoffs import prompt_of, wait_for
from vllm_fleet.bench.plain import scrape, total
from vllm_fleet.config.keys import add_key

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

KEYS: dict[str, str] = {}
"""By tenant, as they were drawn."""
LOG = "access.log"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("front")
    KEYS.update({name: add_key(made / "keys", name) for name in ("alice", "bob")})
    return made


@pytest.fixture
def fleet(shared_fleets: SharedFleets, folder: Path) -> RunningFleet:
    """One prefill, one decode, two keys, an access log."""
    front = f"keys_file: {folder}/keys, access_log: {folder}/{LOG}"
    return shared_fleets.configured("tenants", f"router: {{{front}}}\nhandoff: {{load: always}}\n")


def ask(fleet: RunningFleet, tenant: str, prompt: str, request_id: str = "", **settings: Any) -> dict[str, Any]:
    body = json.dumps({"model": MODEL.name, "prompt": prompt, "max_tokens": 3, "temperature": 0, **settings}).encode()
    request = urllib.request.Request(f"{fleet.router}/v1/completions", body, {"Content-Type": "application/json"})
    request.add_header("Authorization", f"Bearer {KEYS[tenant]}")
    if request_id:
        request.add_header("X-Request-Id", request_id)
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, Any] = json.loads(answer.read())
        return found


def counted(fleet: RunningFleet, what: str) -> dict[str, float]:
    return {name: total(scrape(url), f"vllm:prefix_cache_{what}_total") for name, url in fleet.urls.items()}


def grown(fleet: RunningFleet, tenant: str, prompt: str, **settings: Any) -> float:
    """Prompt tokens that instances found in their own caches for this request."""
    hits, queries = counted(fleet, "hits"), counted(fleet, "queries")
    ask(fleet, tenant, prompt, **settings)
    # An instance's metrics follow its answers by a step.
    wait_for(
        "both have counted it", lambda: all(now > queries[name] for name, now in counted(fleet, "queries").items())
    )
    return sum(counted(fleet, "hits").values()) - sum(hits.values())


def test_a_tenant_finds_its_own_prefixes_and_no_other_ones(fleet: RunningFleet) -> None:
    prompt = prompt_of(600).text
    assert grown(fleet, "alice", prompt) == 0
    assert grown(fleet, "bob", prompt) == 0, "what alice asked"
    assert grown(fleet, "alice", prompt) > 0, "else the test would find nothing either way"
    assert grown(fleet, "bob", prompt) > 0
    assert grown(fleet, "bob", prompt, cache_salt="other") == 0
    assert grown(fleet, "bob", prompt, cache_salt="other") > 0


def test_who_has_no_key_reaches_no_instance(fleet: RunningFleet) -> None:
    before = [total(scrape(url), "vllm:prompt_tokens_total") for url in fleet.urls.values()]
    request = urllib.request.Request(f"{fleet.router}/v1/completions", b'{"prompt": "x"}')
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    assert refused.value.code == 401
    refused.value.close()
    assert [total(scrape(url), "vllm:prompt_tokens_total") for url in fleet.urls.values()] == before


def test_what_operators_see_of_it(fleet: RunningFleet, folder: Path) -> None:
    ask(fleet, "alice", prompt_of(300).text, request_id="seen")
    top = fleet.command("top", "--once", "--json", "--interval", "0.5")
    assert top.returncode == 0, top.stderr
    shown = json.loads(top.stdout)
    assert {row["name"]: row["state"] for row in shown["instances"]} == dict.fromkeys(fleet.urls, "ready")
    assert all(row["kv_used"] is not None for row in shown["instances"])
    assert shown["router"]["requests"] > 0
    traced = fleet.command("trace", "seen", "--json")
    assert traced.returncode == 0, traced.stderr
    assert set(json.loads(traced.stdout)["workers"]) == set(fleet.urls)  # found by the id that instances know
    lines = [json.loads(text) for text in (folder / LOG).read_text().splitlines()]
    line = next(each for each in lines if each["id"] == "seen")
    assert (line["tenant"], line["status"], line["outcome"]) == ("alice", 200, "handed_off")
    assert fleet.command("status").stdout.count("router's metrics: http://127.0.0.1:") == 1
