"""Streams cut at every place and resumed: what the client hears is what it would have heard."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from tests.sim.router_model import Heard, Stream, hear
from vllm_fleet.router import resume_events as ev
from vllm_fleet.router.openai import GenerateRequest, Route, parse_request
from vllm_fleet.router.relay import Relay
from vllm_fleet.router.request_rules import Resume
from vllm_fleet.router.resume import Resumption
from vllm_fleet.router.resume_join import Join, Mismatch
from vllm_fleet.router.resume_track import Tracker

COMPLETION: dict[str, Any] = {"model": "m", "prompt": "some words here", "max_tokens": 24}
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "some words here"}], "max_tokens": 24}
GREEDY = {"temperature": 0}


def parsed(body: dict[str, Any]) -> GenerateRequest:
    route = Route.CHAT if "messages" in body else Route.COMPLETIONS
    return parse_request(route, json.dumps({**body, "stream": True}).encode())


def answered(request: GenerateRequest, seed: int, merge: float) -> list[bytes]:
    """One instance's whole stream."""
    body = json.loads(request.local_body())
    return list(Stream(request.route.value, body, "id", random.Random(seed), merge).events())


def undisturbed(body: dict[str, Any], merge: float = 0.0) -> Heard:
    return hear(b"".join(answered(parsed(body), 0, merge)))


def followed(body: dict[str, Any], mode: Resume = "exact") -> Relay:
    """A stream that has begun."""
    relay = Relay(parsed(body), mode)
    relay.begin()
    return relay


class Client:
    """A stream over several instances, each of which dies after some events."""

    def __init__(self, body: dict[str, Any], mode: Resume = "exact") -> None:
        self.relay = Relay(parsed(body), mode)
        self.got = b""
        self.ways: list[str] = []

    def run(self, cuts: list[int], merge: float) -> Heard | str:
        request = self.relay.request
        for number, cut in enumerate([*cuts, 10_000]):
            self.relay.begin()
            for event in answered(request, 7 * number, merge)[:cut]:
                self.got += self.relay.take(event)
            if self.got.endswith(ev.DONE):
                break
            if not self.got:
                continue
            plan = self.relay.plan()
            if isinstance(plan, str):
                return plan
            self.ways.append(plan.way)
            if plan.way == "finish":
                self.got += self.relay.ending()
                break
            self.relay.resume(plan, "d")
            request = plan.request
        return hear(self.got)


def usual(heard: Heard) -> Heard:
    """What must be equal: not the time at which the stream was made, nor how often usage was told on the way."""
    heard.heads = {json.dumps([one for at, one in enumerate(json.loads(head)) if at != 2]) for head in heard.heads}
    heard.counts = heard.counts[-1:]
    return heard


SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "usage": {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    "stop": {"stop": ["the ", "xb"], "max_tokens": 40},
    "stop kept": {"stop": "the ", "include_stop_str_in_output": True, "max_tokens": 40},
    "long": {"max_tokens": 40, "ignore_eos": True, "min_tokens": 20},
    "ids": {"return_token_ids": True},
    "neutral": {"n": 1, "presence_penalty": 0.0, "response_format": {"type": "text"}, "tools": [], "echo": False},
}
REPLAYED: dict[str, dict[str, Any]] = {
    "penalty": {"presence_penalty": 0.5, "temperature": 0},
    "grammar": {"response_format": {"type": "json_object"}, "temperature": 0},
    "seed": {"seed": 5, "temperature": 0.7},
    "seed stop": {"seed": 6, "temperature": 0.7, "stop": ["the "], "max_tokens": 40},
    "unknown": {"something_new": 1, "temperature": 0},
}


@pytest.mark.parametrize("merge", [0.0, 0.4])
@pytest.mark.parametrize("start", [COMPLETION, CHAT], ids=["completion", "chat"])
@pytest.mark.parametrize("shape", [*SHAPES, *REPLAYED])
def test_cut_anywhere_the_client_hears_the_same(start: dict[str, Any], shape: str, merge: float) -> None:
    body = {**start, **GREEDY, **SHAPES.get(shape, {}), **REPLAYED.get(shape, {})}
    expected = usual(undisturbed(body))
    events = len(answered(parsed(body), 0, merge))
    for cut in range(events):
        client = Client(body)
        heard = client.run([cut], merge)
        assert isinstance(heard, Heard), (cut, heard)
        assert len({json.loads(head)[2] for head in heard.heads}) == 1, "one time of creation"
        assert usual(heard) == expected, cut
        if "prompt" in body and client.ways and client.ways != ["finish"]:
            assert client.ways == (["replay"] if shape in REPLAYED else ["continue"])


@pytest.mark.parametrize("start", [COMPLETION, CHAT], ids=["completion", "chat"])
@pytest.mark.parametrize("shape", ["plain", "usage", "stop", "stop kept", "ids", "penalty", "seed"])
def test_cut_again_and_again(start: dict[str, Any], shape: str) -> None:
    body = {**start, **GREEDY, **SHAPES.get(shape, {}), **REPLAYED.get(shape, {})}
    expected = usual(undisturbed(body))
    rng = random.Random(shape)
    for _ in range(25):
        cuts = [rng.randrange(1, 9) for _ in range(rng.randrange(2, 6))]
        heard = Client(body).run(cuts, 0.3)
        assert isinstance(heard, Heard), (cuts, heard)
        assert usual(heard) == expected, cuts


def test_logprobs_go_on_counting() -> None:
    body = {**COMPLETION, **GREEDY, "logprobs": 1}
    expected = undisturbed(body)
    assert expected.logprobs
    for cut in range(1, 20):
        heard = Client(body).run([cut, 3], 0.3)
        assert isinstance(heard, Heard)
        assert (heard.logprobs, heard.text) == (expected.logprobs, expected.text), cut


@pytest.mark.parametrize("ids", [False, True])
def test_sampled_text_joins_without_a_seam(ids: bool) -> None:
    """The tokens differ from run to run; text and tokens must still be those of one answer."""
    body = {**COMPLETION, "ignore_eos": True, "max_tokens": 40, "return_token_ids": ids}
    body |= {"stream_options": {"include_usage": True}}
    whole = undisturbed({**body, "return_token_ids": True}).prompts[0]
    for cut in range(1, 40):
        heard = Client(body).run([cut], 0.0)
        assert isinstance(heard, Heard)
        assert (heard.finish, heard.usage[0]["completion_tokens"]) == ("length", 40)
        assert heard.usage[0]["prompt_tokens"] == len(whole)
        if ids:
            again = {**body, "prompt": [*whole, *heard.tokens], "max_tokens": 1, **GREEDY}
            assert len(heard.tokens) == 40
            assert len(hear(b"".join(answered(parsed(again), 0, 0.0))).prompts[0]) == len(whole) + 40


def test_a_bare_client_sees_no_token_ids() -> None:
    heard = Client({**CHAT, **GREEDY}).run([5], 0.0)
    assert isinstance(heard, Heard)
    assert (heard.ids_shown, heard.prompts, heard.roles) == (False, [], 1)


@pytest.mark.parametrize("start", [COMPLETION, CHAT], ids=["completion", "chat"])
def test_an_undisturbed_stream_is_byte_for_byte_what_an_instance_sends_that_was_not_asked(
    start: dict[str, Any],
) -> None:
    body = {**start, "stream_options": {"include_usage": True}}
    relay = followed({**body, **GREEDY})
    asked = b"".join(map(relay.take, answered(relay.request, 0, 0.0)))
    assert b'token_ids":[' in b"".join(answered(relay.request, 0, 0.0))
    assert asked == b"".join(answered(parsed({**body, **GREEDY}), 0, 0.0))


# What is not exact -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"presence_penalty": 1}, "inexact_penalty"),
        ({"stop": ["ab"]}, "inexact_stop"),
        ({"bad_words": ["a"]}, "inexact_bad_words"),
        ({"skip_special_tokens": False, "spaces_between_special_tokens": False}, "inexact_special_tokens"),
    ],
)
def test_the_setting_decides_where_a_resume_is_not_exact(fields: dict[str, Any], why: str) -> None:
    body = {**CHAT, "ignore_eos": True, **fields}
    assert Client(body).run([6], 0.0) == why
    client = Client(body, "always")
    assert isinstance(client.run([6], 0.0), Heard)
    assert client.ways == ["approximate"]


@pytest.mark.parametrize("mode", ["exact", "always"])
@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"response_format": {"type": "json_object"}}, "field"),
        ({"structured_outputs": {"regex": "a+"}}, "field"),
        ({"logprobs": True}, "field"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"something_new": 1}, "field"),
    ],
)
def test_state_that_is_not_in_the_tokens_ends_the_stream(fields: dict[str, Any], why: str, mode: Resume) -> None:
    assert Client({**CHAT, "ignore_eos": True, **fields}, mode).run([6], 0.0) == why


@pytest.mark.parametrize("fields", [{"n": 2}, {"best_of": 2}, {"echo": True}, {"include_reasoning": False}])
def test_what_cannot_be_followed_is_left_alone(fields: dict[str, Any]) -> None:
    request = parsed({**COMPLETION, **fields})
    assert Relay(request, "exact").request is request
    assert Relay(request, "exact").plan() == "not_followed"


def test_off_is_off() -> None:
    request = parsed(COMPLETION)
    assert Relay(request, "off").request is request
    assert Relay(request, "off").plan() == "off"
    unstreamed = parse_request(Route.COMPLETIONS, json.dumps(COMPLETION).encode())
    assert Relay(unstreamed, "exact").request is unstreamed


def test_an_instance_that_gives_no_token_ids_cannot_be_resumed() -> None:
    relay = followed(COMPLETION)
    for event in answered(parsed(COMPLETION), 0, 0.0)[:3]:
        assert relay.take(event) == event
    assert relay.plan() == "no_token_ids"


def test_a_parser_of_the_instances_that_took_part_rules_a_continuation_out() -> None:
    relay = followed({**CHAT, "temperature": 1}, "always")
    events = answered(relay.request, 0, 0.0)
    thought = events[1].replace(b'"delta":{"content":', b'"delta":{"reasoning":')
    nothing = b'"delta":{},"logprobs":null,"finish_reason":null,"token_ids":[4]'
    kept_back = b'data: {"id":"x","created":1,"model":"m","choices":[{"index":0,' + nothing + b"}]}\n\n"
    assert relay.take(events[0] + kept_back) == ev.without_token_ids(events[0])
    relay.take(thought)
    assert relay.plan() == "parsed"


# What the second instance may do wrong -----------------------------------------------------------------------------


def second(body: dict[str, Any], cut: int) -> tuple[Relay, Resumption]:
    client = Client(body)
    client.relay.begin()
    for event in answered(client.relay.request, 0, 0.0)[:cut]:
        client.got += client.relay.take(event)
    plan = client.relay.plan()
    assert isinstance(plan, Resumption)
    client.relay.resume(plan, "d")
    client.relay.begin()
    return client.relay, plan


def test_other_tokens_are_not_joined() -> None:
    relay, plan = second({**COMPLETION, "seed": 3}, 6)
    other = parsed({**COMPLETION, "seed": 4, "return_token_ids": True})
    assert plan.way == "replay"
    with pytest.raises(Mismatch):
        relay.take(b"".join(answered(other, 0, 0.0)))


def test_a_prompt_that_comes_back_is_not_joined() -> None:
    tracker = Tracker(chat=False, strip=True)
    tracker.read()
    join = Join(Resumption("continue", parsed(COMPLETION), 5, (), 0, 0, clean=False), tracker)
    with pytest.raises(Mismatch, match="anew"):
        join.take(b'data: {"choices":[{"text":"' + b"x" * 500 + b'","token_ids":[7]}]}\n\n')


@pytest.mark.parametrize("event", [b"data: {\n\n", b'data: {"choices":[{"text":1}]}\n\n', b"data: \xff\n\n"])
def test_rubbish_is_not_joined(event: bytes) -> None:
    relay, _ = second({**COMPLETION, **GREEDY}, 6)
    with pytest.raises(Mismatch):
        relay.take(event)


def test_an_instances_own_error_is_kept_from_the_client_and_a_clients_is_not() -> None:
    relay = followed(COMPLETION)
    events = answered(relay.request, 0, 0.0)
    died = b'data: {"error": {"message": "EngineCore died", "type": "InternalServerError", "code": 500}}\n\n'
    assert relay.take(events[0] + died + ev.DONE) == ev.without_token_ids(events[0])
    assert relay.error is not None
    relay = followed(COMPLETION)
    refused = b'data: {"error": {"message": "no", "type": "BadRequestError", "code": 400}}\n\n'
    assert relay.take(refused + ev.DONE) == refused + ev.DONE
    assert relay.error is None


# Token ids in bytes ------------------------------------------------------------------------------------------------


def test_token_ids_are_cut_out_of_keys_only() -> None:
    event = {"choices": [{"text": '"token_ids":[1]', "prompt_token_ids": [1, 2], "token_ids": []}], "token_ids": [3]}
    sent = b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"
    left = json.loads(ev.without_token_ids(sent * 2).split(b"\n\n")[1][6:])
    nothing = {"text": '"token_ids":[1]', "prompt_token_ids": None, "token_ids": None}
    assert left == {"choices": [nothing], "token_ids": None}
    assert ev.without_token_ids(b": ping\n\n") == b": ping\n\n"
