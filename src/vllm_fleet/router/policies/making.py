"""Policies by name."""

from __future__ import annotations

from vllm_fleet.core.env import Env
from vllm_fleet.router.policies.contract import Policy
from vllm_fleet.router.policies.least_load import LeastLoad
from vllm_fleet.router.policies.power_of_two import PowerOfTwo
from vllm_fleet.router.policies.prefix import Prefix
from vllm_fleet.router.policies.round_robin import RoundRobin
from vllm_fleet.router.policies.session import Session
from vllm_fleet.router.policies.settings import PolicyName, PolicySettings
from vllm_fleet.router.prefix.book import PrefixBook


def make(name: PolicyName, settings: PolicySettings, book: PrefixBook, env: Env) -> Policy:
    """A policy object; prefill and decode each get their own, and share what is known of prefixes."""
    if name == "round_robin":
        return RoundRobin()
    if name == "power_of_two":
        return PowerOfTwo(env.rng)
    if name == "session":
        return Session(settings.session_header, settings.session_bound)
    if name == "prefix":
        return Prefix(book, settings.load_tokens)
    return LeastLoad()
