"""Each policy alone: what it promises, and what it must not do."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_fleet.core import limits
from vllm_fleet.core.env import RealEnv
from vllm_fleet.core.ids import InstanceName
from vllm_fleet.router.gauges import Gauges, LoadBook, parse_gauges
from vllm_fleet.router.openai import Route, parse_request
from vllm_fleet.router.policies.contract import Policy
from vllm_fleet.router.policies.facts import Facts
from vllm_fleet.router.policies.least_load import LeastLoad
from vllm_fleet.router.policies.making import make
from vllm_fleet.router.policies.power_of_two import PowerOfTwo
from vllm_fleet.router.policies.round_robin import RoundRobin
from vllm_fleet.router.policies.session import Session
from vllm_fleet.router.policies.settings import PolicyName, PolicySettings
from vllm_fleet.router.policies.skipping import Skipping
from vllm_fleet.router.prefix.book import PrefixBook

RELAXED = settings(deadline=None)  # a busy machine is no failure

ALL: tuple[PolicyName, ...] = ("round_robin", "least_load", "power_of_two", "session", "prefix")


class Fixed:
    """Loads as told."""

    def __init__(self, loads: Mapping[str, float] | None = None) -> None:
        self.loads = Counter(loads or {})

    def load(self, name: str) -> float:
        return self.loads[name]


def names(*given: str) -> tuple[InstanceName, ...]:
    return tuple(InstanceName(name) for name in given)


def facts(headers: Mapping[str, str] | None = None, route: Route = Route.COMPLETIONS, **fields: Any) -> Facts:
    body = json.dumps({"prompt": "hi", **fields}).encode()
    return Facts(parse_request(route, body), headers or {})


def policy_of(name: PolicyName) -> Policy:
    return make(name, PolicySettings(), PrefixBook("r"), RealEnv())


def use(policy: Policy, offered: Sequence[InstanceName], loads: Fixed, asked: Facts) -> str:
    chosen = policy.choose(offered, loads, asked)
    assert chosen is not None
    policy.sent(chosen, asked)
    return chosen


# All of them -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@RELAXED
@given(
    turns=st.lists(st.tuples(st.sets(st.sampled_from("abcdefg"), min_size=1), st.text("xy", max_size=3)), max_size=20),
    loads=st.dictionaries(st.sampled_from("abcdefg"), st.integers(0, 9)),
)
def test_only_who_is_offered_is_chosen_as_members_come_and_go(
    name: PolicyName, turns: list[tuple[set[str], str]], loads: dict[str, float]
) -> None:
    policy = policy_of(name)
    for offered, prompt in turns:
        chosen = use(policy, names(*sorted(offered)), Fixed(loads), facts(prompt=prompt * 100, user=prompt))
        assert chosen in offered
        policy.forget(InstanceName("a"))


@pytest.mark.parametrize("name", ALL)
def test_nobody_offered_nobody_chosen(name: PolicyName) -> None:
    assert policy_of(name).choose((), Fixed(), facts()) is None


@pytest.mark.parametrize("name", ALL)
def test_equal_instances_and_unlike_requests_get_equal_shares(name: PolicyName) -> None:
    policy, loads, offered = policy_of(name), Fixed(), names("a", "b", "c", "d")
    for number in range(1200):
        chosen = use(policy, offered, loads, facts(prompt=f"{number} is unlike others " * 9, user=f"user {number}"))
        loads.loads[chosen] += 1
    assert all(abs(count - 300) <= 60 for count in loads.loads.values()), loads.loads


# One by one --------------------------------------------------------------------------------------------------------


def test_round_robin_keeps_its_turn_when_members_come_and_go() -> None:
    policy, loads = RoundRobin(), Fixed({"a": 99})
    got = [use(policy, names(*offered), loads, facts()) for offered in ("abc", "abc", "ac", "abcd", "abcd", "ab")]
    assert got == ["a", "b", "c", "d", "a", "b"]


def test_choosing_without_sending_takes_no_turn() -> None:
    policy = RoundRobin()
    assert [policy.choose(names("a", "b"), Fixed(), facts()) for _ in range(3)] == ["a", "a", "a"]


def test_least_load_takes_turns_among_equals_only() -> None:
    policy = LeastLoad()
    assert [use(policy, names("a", "b", "c"), Fixed(), facts()) for _ in range(4)] == ["a", "b", "c", "a"]
    assert use(policy, names("a", "b"), Fixed({"a": 1, "b": 2.5}), facts()) == "a"


def test_power_of_two_never_takes_the_busiest_and_looks_at_two() -> None:
    class Watched(Fixed):
        asked = 0

        def load(self, name: str) -> float:
            self.asked += 1
            return super().load(name)

    policy, loads = PowerOfTwo(random.Random(1)), Watched({"a": 1, "b": 2, "c": 3})
    chosen = Counter(use(policy, names("a", "b", "c"), loads, facts()) for _ in range(300))
    assert loads.asked == 600
    assert chosen["c"] == 0
    assert chosen["a"] > chosen["b"] > 50


# Sessions ----------------------------------------------------------------------------------------------------------


def where(policy: Policy, offered: Sequence[InstanceName], sessions: int = 400) -> dict[int, str]:
    loads = Fixed()
    return {n: use(policy, offered, loads, facts({"x-session-id": f"s{n}"})) for n in range(sessions)}


def test_a_session_stays_and_only_those_of_a_lost_instance_move() -> None:
    policy = Session("x-session-id", 1000.0)
    before = where(policy, names("a", "b", "c", "d"))
    assert where(policy, names("a", "b", "c", "d")) == before
    after = where(policy, names("a", "b", "d"))
    moved = {session for session in before if before[session] != after[session]}
    assert moved == {session for session, name in before.items() if name == "c"}
    joined = where(policy, names("a", "b", "c", "d", "e"))
    assert {joined[s] for s in before if joined[s] != before[s]} == {"e"}


def test_a_busy_instance_is_passed_and_comes_back() -> None:
    policy, offered = Session("x-session-id", 1.25), names("a", "b", "c")
    asked = facts({"x-session-id": "one"})
    home = use(policy, offered, Fixed(), asked)
    assert use(policy, offered, Fixed(dict.fromkeys("abc", 10)), asked) == home
    other = use(policy, offered, Fixed({home: 10}), asked)
    assert other != home
    assert use(policy, offered, Fixed({home: 10}), asked) == other
    assert use(policy, offered, Fixed(), asked) == home


@RELAXED
@given(st.dictionaries(st.sampled_from("abcd"), st.integers(0, 50), min_size=2), st.integers(0, 99))
def test_the_bound_holds(loads: dict[str, float], session: int) -> None:
    policy = Session("x-session-id", 1.25)
    chosen = use(policy, names(*sorted(loads)), Fixed(loads), facts({"x-session-id": str(session)}))
    mean = (sum(loads.values()) + 1) / len(loads)
    assert loads[chosen] + 1 <= 1.25 * mean + 1


def test_what_names_a_session() -> None:
    assert facts({"x-a": "h"}, user="u").session("x-a") == "h"
    assert facts(user="u", prompt_cache_key="k").session("x-a") == "k"
    assert facts(user="u").session("x-a") == "u"
    for nobody in (facts(), facts(user=""), facts(user=3), facts(user=None)):
        assert nobody.session("x-a") is None


def test_requests_without_a_session_go_to_the_least_busy() -> None:
    assert use(Session("x-session-id", 1.25), names("a", "b"), Fixed({"a": 3}), facts()) == "b"


# Facts -------------------------------------------------------------------------------------------------------------


def test_the_next_turn_of_a_conversation_begins_with_the_one_before() -> None:
    said = [{"role": "user", "content": "hello"}]
    first = facts(route=Route.CHAT, messages=said).prompt
    second = facts(route=Route.CHAT, messages=[*said, {"role": "assistant", "content": "hi"}]).prompt
    assert first.space == second.space
    assert second.text.startswith(first.text)
    assert facts(prompt="hello world").prompt.text.startswith(facts(prompt="hello").prompt.text)
    assert facts(prompt=[1, 2, 3]).prompt.text.startswith(facts(prompt=[1, 2]).prompt.text)


@pytest.mark.parametrize("other", [{"cache_salt": "s"}, {"model": "adapter"}, {"tools": [{"type": "function"}]}])
def test_prompts_that_may_not_share_kv_have_other_spaces(other: dict[str, Any]) -> None:
    assert facts(**other).prompt.space != facts().prompt.space
    assert facts(**other).prompt.space == facts(**other, temperature=0, n=2).prompt.space
    assert facts(route=Route.CHAT).prompt.space != facts().prompt.space


def test_salts_cannot_be_put_together_to_look_like_another() -> None:
    assert facts(model="m", cache_salt="s").prompt.space != facts(model="m\0cache_salt\0s").prompt.space
    assert len(facts(cache_salt="s" * 5000).prompt.space) <= 128


def test_token_ids_are_counted_and_text_is_estimated() -> None:
    assert facts(prompt=list(range(100))).tokens == 100
    assert facts(prompt="x" * 400).tokens == 100
    assert facts(prompt="").tokens == 0
    assert Facts(parse_request(Route.COMPLETIONS, b"{}"), {}).tokens == 0


# Loads -------------------------------------------------------------------------------------------------------------

PAGE = b"""# HELP vllm:num_requests_running Number of requests.
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 1.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",reason="x"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="100"} 1.0
"""


def test_an_instances_gauges_are_read() -> None:
    assert parse_gauges(PAGE) == Gauges(6.0, 0.25, 1600)
    assert parse_gauges(b"other 1\n") is None


@pytest.mark.parametrize("text", [b"NaN", b"-1", b"x", b"inf", b"1e300"])
def test_gauges_nobody_can_believe_are_not(text: bytes) -> None:
    assert parse_gauges(b'vllm:num_requests_running{a="b"} ' + text + b"\n") is None


def test_requests_of_others_count_until_the_reading_is_old() -> None:
    own = Counter({"a": 2})
    book = LoadBook(own.__getitem__)
    book.take("a", Gauges(5.0), 0.0)
    assert book.load("a") == 5.0
    own["a"] = 7
    assert book.load("a") == 10.0
    book.age(limits.GAUGES_STALE_S)
    assert book.load("a") == 10.0
    book.age(limits.GAUGES_STALE_S + 0.1)
    assert book.load("a") == 7.0


def test_own_requests_are_not_counted_twice_and_a_full_cache_weighs() -> None:
    book = LoadBook(lambda name: 4)
    book.take("a", Gauges(4.0), 0.0)
    assert book.load("a") == 4.0
    book.take("a", Gauges(4.0, 1.0), 0.0)
    assert book.load("a") == pytest.approx(8.0)


# Whether to hand off -----------------------------------------------------------------------------------------------


def test_short_prompts_and_held_ones_are_not_worth_a_handoff() -> None:
    rules = Skipping(min_tokens=100, cached_share=0.9)
    long, short = facts(prompt="x" * 4000), facts(prompt="x" * 396)
    assert rules.short(short)
    assert not rules.short(long)
    assert rules.cached(long, 0.9)
    assert not rules.cached(long, 0.89)
    assert not rules.cached(short, 0.0), "nothing is held: that is for short() to say"
    assert Skipping(100, 1.0).cached(long, 0.901), "99 tokens are missing"
    assert not Skipping(0, 1.0).cached(long, 1.0), "1: never"
    assert not Skipping().short(facts(prompt=""))
