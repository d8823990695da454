"""Bodies in, bodies out: what can be handed off, what is dropped, what each side gets."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vllm_fleet.core.errors import BadRequest
from vllm_fleet.router import headers, problem
from vllm_fleet.router.openai import Route, parse_request, take_params
from vllm_fleet.router.sse import EventStream


def parse(body: dict[str, Any], route: Route = Route.COMPLETIONS) -> Any:
    return parse_request(route, json.dumps(body).encode())


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"prompt": "hi"}, None),
        ({"prompt": [1, 2, 3]}, None),
        ({"prompt": ["hi"]}, None),
        ({"prompt": [[1, 2]]}, None),
        ({"prompt": "hi", "n": 1, "best_of": 1, "echo": False, "suffix": "", "prompt_logprobs": None}, None),
        ({"prompt": "hi", "n": None}, None),
        ({"prompt": ["a", "b"]}, "several_prompts"),
        ({"prompt": [[1], [2]]}, "several_prompts"),
        ({"prompt": "hi", "n": 2}, "n"),
        ({"prompt": "hi", "best_of": 3}, "best_of"),
        ({"prompt": "hi", "use_beam_search": True}, "use_beam_search"),
        ({"prompt": "hi", "echo": True}, "echo"),
        ({"prompt": "hi", "prompt_logprobs": 0}, "prompt_logprobs"),
        ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
        ({"prompt": "hi", "suffix": "x"}, "suffix"),
        ({"prompt": "hi", "truncate_prompt_tokens": -1}, "truncate_prompt_tokens"),
        ({"prompt": "hi", "max_tokens": 0}, "no_answer_wanted"),
        ({"prompt": []}, "malformed"),
        ({"prompt": ""}, "malformed"),
        ({"prompt": None}, "malformed"),
        ({"prompt": {"a": 1}}, "malformed"),
        ({}, "malformed"),
    ],
)
def test_which_completions_can_be_handed_off(body: dict[str, Any], reason: str | None) -> None:
    assert parse(body).skip == reason


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "user", "content": "hi"}], None),
        ([{"role": "user", "content": [{"type": "text", "text": "hi"}]}], None),
        ([{"role": "assistant", "content": None, "tool_calls": []}], None),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "multimodal"),
        ([{"role": "user", "content": [{"image_url": "x"}]}], "multimodal"),
        ("hi", "malformed"),
    ],
)
def test_which_chats_can_be_handed_off(messages: Any, reason: str | None) -> None:
    assert parse({"messages": messages}, Route.CHAT).skip == reason


def test_prefill_gets_the_prompt_and_one_token() -> None:
    body = parse(
        {
            "model": "m",
            "prompt": "hi",
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": 50,
            "min_tokens": 5,
            "logprobs": 2,
            "stop": ["x"],
            "cache_salt": "s",
            "temperature": 0,
        }
    ).prefill_body()
    assert json.loads(body) == {
        "model": "m",
        "prompt": "hi",
        "stream": False,
        "n": 1,
        "max_tokens": 1,
        "stop": ["x"],
        "cache_salt": "s",
        "temperature": 0,
        "kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False},
    }


def test_prefill_of_a_chat_bounds_both_token_limits() -> None:
    request = parse({"messages": [], "max_completion_tokens": 9, "logprobs": True, "top_logprobs": 3}, Route.CHAT)
    sent = json.loads(request.prefill_body())
    assert (sent["max_tokens"], sent["max_completion_tokens"]) == (1, 1)
    assert not sent.keys() & {"logprobs", "top_logprobs"}


def test_decode_gets_every_value_byte_for_byte() -> None:
    raw = b'{"prompt":"\\u00e9 \xc3\xa9","seed":12345678901234567890123,"temperature":1.00,"x":{"b":1,"a":[ ]}}'
    request = parse_request(Route.COMPLETIONS, raw)
    assert request.local_body() == raw
    assert request.decode_body(b'{"t": 1}') == raw[:-1] + b',"kv_transfer_params":{"t": 1}}'


def test_what_steers_the_inside_is_dropped() -> None:
    raw = (
        b'{"prompt":"hi","kv_transfer_params":{"remote_host":"10.0.0.1"},"kv\\u005ftransfer_params":{"a":1},'
        b'"ec_transfer_params":{"b":1},"request_id":"mine","cache_salt":"s",'
        b'"vllm_xargs":{"kv_transfer_params":"x","kept":1}}'
    )
    request = parse_request(Route.COMPLETIONS, raw)
    assert json.loads(request.local_body()) == {"prompt": "hi", "cache_salt": "s", "vllm_xargs": {"kept": 1}}
    assert request.dropped == (
        "ec_transfer_params",
        "kv_transfer_params",
        "request_id",
        "vllm_xargs.kv_transfer_params",
    )
    sent = json.loads(request.prefill_body())["kv_transfer_params"]
    assert sent == {"do_remote_decode": True, "do_remote_prefill": False}


@pytest.mark.parametrize(
    "raw", [b"", b"null", b"[1]", b"{", b'{"a":tru}', b'{"a":1}x', b'{"a":"\xff"}', b'{"a":' + b"[" * 100_000, b"\x00"]
)
def test_what_is_no_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(BadRequest):
        parse_request(Route.COMPLETIONS, raw)


def test_params_are_taken_verbatim_or_not_at_all() -> None:
    assert take_params(b'{"id":"x","kv_transfer_params": {"a": [1, 2]},"choices":[]}') == b'{"a": [1, 2]}'
    for answer in (b"{}", b'{"kv_transfer_params":null}', b'{"kv_transfer_params":{}}', b'{"kv_transfer_params":[1]}'):
        assert take_params(answer) is None
    assert take_params(b"not json") is None


def test_errors_are_openai_objects() -> None:
    made = json.loads(problem.no_instance().body())
    assert made["error"].keys() == {"message", "type", "param", "code"}
    theirs = b'{"error":{"message":"m","type":"t","param":null,"code":400}}'
    assert problem.foreign("p", 400, theirs) is theirs
    for plain in (b"oops", b'{"error":"Unauthorized"}', b"", b"[" * 100_000):
        wrapped = json.loads(problem.foreign("p", 500, plain))
        assert wrapped["error"]["code"] == "instance_error"
        assert len(wrapped["error"]["message"]) < 700


def test_a_stream_is_passed_on_event_by_event() -> None:
    stream = EventStream()
    assert stream.feed(b"data: 1\n\nda") == b"data: 1\n\n"
    assert stream.feed(b"ta: 2\n") == b""
    assert stream.feed(b"\ndata: [DONE]") == b"data: 2\n\n"
    assert not stream.done
    assert stream.rest() == b"data: [DONE]"
    assert stream.done


def test_a_stream_with_carriage_returns_does_not_wait() -> None:
    stream = EventStream()
    assert stream.feed(b"data: 1\r\n\r\ndata: [DONE]\r\n\r\n") == b"data: 1\r\n\r\ndata: [DONE]\r\n\r\n"
    assert stream.done


def test_an_endless_event_is_not_kept() -> None:
    stream = EventStream()
    assert stream.feed(b"x" * (2 << 20)) == b"x" * (2 << 20)


@pytest.mark.parametrize("given", [None, "", "a" * 129, "a b", "a\n", "../x", "-x", "é"])
def test_a_strange_request_id_is_replaced(given: str | None) -> None:
    assert headers.request_id(given, "fresh") == "fresh"


def test_a_plain_request_id_is_kept() -> None:
    assert headers.request_id("Req-1.a:b_c", "fresh") == "Req-1.a:b_c"


def test_headers_that_cross() -> None:
    asked = {"authorization": "Bearer k", "x-data-parallel-rank": "3", "host": "evil", "cookie": "c"}
    assert headers.to_instance(asked, "r") == {
        "authorization": "Bearer k",
        "content-type": "application/json",
        "x-request-id": "r",
    }
    pairs = [("Connection", "X-Hop, close"), ("X-Hop", "1"), ("Transfer-Encoding", "chunked"), ("X-Kept", "1")]
    assert headers.to_client(pairs) == [("X-Kept", "1")]
