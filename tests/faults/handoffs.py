"""What the tests of faulty handoffs share: fleets to break, prompts of a length, tickets of our own."""

from __future__ import annotations

import itertools
import random
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.conftest import MODEL
from tests.integration.asking import body
from vllm_fleet.bench.gauges import Gauges, holdings, leaks, rest, settle
from vllm_fleet.bench.own_fleet import OwnFleet
from vllm_fleet.bench.plain import post, scrape, total
from vllm_fleet.bench.recall import RecallPrompt, facts_for_tokens, make_prompt, prompt_tokens
from vllm_fleet.config.fleet import FleetConfig
from vllm_fleet.wire.ticket import StreamTicket, stream_params

FACTS_MAX = 286  # of the recall task; longer prompts have spaces in front, a token each
LEASES = {"lease_s": 3, "hold_s": 6, "load_s": 3, "prefill_s": 12}
HOLD = {"do_remote_decode": True, "do_remote_prefill": False}
_seeds = itertools.count(int.from_bytes(secrets.token_bytes(4)))  # no prompt twice: no prefix cache has it


@contextmanager
def broken_fleet(home: Path, *, odd_decode_args: Sequence[str] = (), **settings: Any) -> Iterator[OwnFleet]:
    """A fleet of the demo model with short leases. ``odd_decode_args`` are the last decode instance's alone."""
    router = {"port": 0, "request_timeout_s": 60.0}
    tree = {"model": str(MODEL), "handoff": LEASES, "router": router, **settings}
    fleet = OwnFleet(FleetConfig.model_validate(tree), home)
    if odd_decode_args:
        last = fleet.instances("decode")[-1]
        fleet.specs[last] = replace(fleet.specs[last], argv=(*fleet.specs[last].argv, *odd_decode_args))
    fleet.start()
    try:
        warm(fleet, fleet.instances())
        yield fleet
    finally:
        fleet.close()


def warm(fleet: OwnFleet, names: Sequence[str]) -> None:
    """An instance's first forward pass compiles: up to 40 s on a busy machine, which no fault of ours should meet."""
    with ThreadPoolExecutor(len(names)) as pool:
        for answered in [pool.submit(ask, fleet.url(name), prompt_of(300)) for name in names]:
            answered.result(130.0)


def prompt_of(tokens: int) -> RecallPrompt:
    """A prompt of about so many tokens that nobody has asked before."""
    facts = min(facts_for_tokens(tokens), FACTS_MAX)
    made = make_prompt(random.Random(next(_seeds)), facts)
    return replace(made, text=" " * max(0, tokens - prompt_tokens(facts)) + made.text)


def ask(url: str, prompt: RecallPrompt, params: Any = None, **settings: Any) -> tuple[bool, dict[str, str]]:
    """Whether the answer is right, and its headers."""
    wanted = {**body(prompt.text, max_tokens=3), **settings}
    if params is not None:
        wanted["kv_transfer_params"] = params
    answer, headers = post(f"{url}/v1/completions", wanted, timeout_s=65.0)
    text: str = answer["choices"][0]["text"]
    return text[:3] == prompt.value[: len(text)] or text[:3] == alone(url, prompt)[: len(text)], headers


def alone(url: str, prompt: RecallPrompt) -> str:
    """What one instance answers that computes the prompt itself, out of no cache: the model errs once in 500 times."""
    salted = {**body(prompt.text, max_tokens=3), "cache_salt": secrets.token_hex(8), "prompt_logprobs": 1}
    answer, _ = post(f"{url}/v1/completions", salted, timeout_s=65.0)
    text: str = answer["choices"][0]["text"]
    return text[:3]


def asked(
    pool: ThreadPoolExecutor, url: str, prompts: Sequence[RecallPrompt], **settings: Any
) -> list[Future[tuple[bool, dict[str, str]]]]:
    """Ask all at once."""
    return [pool.submit(ask, url, prompt, **settings) for prompt in prompts]


def right(asked: Sequence[Future[tuple[bool, dict[str, str]]]]) -> list[dict[str, str]]:
    """Every answer is here, in time and right; their headers."""
    found = [one.result(70.0) for one in asked]
    assert all(good for good, _ in found)
    return [headers for _, headers in found]


def counted(url: str, outcome: str) -> float:
    return total(scrape(url), "vllm:fleet_handoffs_total", outcome=outcome)


def counts(url: str, outcome: str, at_least: float) -> None:
    """An instance's metrics follow its answers by a step."""
    wait_for(f"{outcome} reaches {at_least}", lambda: counted(url, outcome) >= at_least)


def gauge(url: str, name: str) -> float:
    return total(scrape(url), f"vllm:{name}")


def wait_for(what: str, check: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until ``check()`` is true."""
    until = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < until, f"{what}: not within {seconds} s"
        time.sleep(0.01)


def mint(fleet: OwnFleet, prefill: str = "prefill-0", **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A stream ticket as the router makes it: what prefill gets, and what decode gets."""
    member = fleet.members()[prefill]
    ticket = StreamTicket(secrets.token_hex(16), member.incarnation, member.workers)
    return stream_params(replace_ticket(ticket, **changes), fleet.token)


def replace_ticket(ticket: StreamTicket, **changes: Any) -> StreamTicket:
    found = {"transfer": ticket.transfer, "engine": ticket.engine, "workers": ticket.workers, **changes}
    return StreamTicket(**found)


def holds_nothing(fleet: OwnFleet, before: dict[str, Gauges], within_s: float = 10.0) -> None:
    """Everything is given back in time."""
    now, _ = settle(fleet, before, within_s)
    assert leaks(before, now) == []


def idle(fleet: OwnFleet) -> dict[str, Gauges]:
    """The gauges of all instances, while nobody asks anything and nothing is held."""
    found, took_s = rest(fleet, fleet.instances())
    held = [said for name in found for said in holdings(name, found[name])]
    assert held == [], f"after {took_s:.0f} s of quiet"
    return found
