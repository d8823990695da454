"""Prefill/decode in name only is found: counters in, findings out."""

from __future__ import annotations

import pytest

from vllm_fleet.core import limits
from vllm_fleet.router.audit import Audit, Counts, Ledger, parse_counts, reconcile
from vllm_fleet.wire.control import Member

PAGE = """# HELP vllm:fleet_handoffs_total Handoffs
# TYPE vllm:fleet_handoffs_total counter
vllm:fleet_handoffs_total{engine="0",model_name="m",outcome="loaded"} 7.0
vllm:fleet_handoffs_total{engine="1",model_name="m",outcome="loaded"} 2.0
vllm:fleet_handoffs_total{engine="0",model_name="m",outcome="local"} 1.0
vllm:fleet_handoffs_total{engine="0",model_name="m",outcome="recomputed"} 3.0
vllm:fleet_handoffs_total{engine="0",model_name="m",outcome="refused"} 4.0
vllm:fleet_handoffs_created{engine="0",model_name="m",outcome="loaded"} 1.7e9
vllm:fleet_handoff_bytes_total{engine="0",model_name="m"} 4.096e+06
vllm:fleet_handoff_bytes_created{engine="0",model_name="m"} 1.7e9
vllm:prompt_tokens_total{engine="0",model_name="m"} 12.0
broken line that is not ours {
"""
SETTLED = limits.AUDIT_SETTLE_S + 0.1


def member(life: int = 1) -> Member:
    return Member("d", "decode", "http://d:1", 1, f"d-{life}", life, "ready")


def test_counters_are_summed_over_engines() -> None:
    assert parse_counts(PAGE) == Counts(9, 1, 3, 4, 4_096_000, True)


def test_a_page_without_our_connector() -> None:
    assert parse_counts("vllm:prompt_tokens_total 3\n") == Counts()


def test_a_broken_page_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_counts("vllm:fleet_handoffs_total{outcome= nan nan\n")


def test_running_handoffs_are_not_judged() -> None:
    ledger = Ledger()
    reconcile(ledger, Counts(), 0.0)
    ledger.sent = 5
    assert reconcile(ledger, Counts(), 1.0).without_bytes == 0
    assert reconcile(ledger, Counts(), 1.0 + SETTLED).without_bytes == 5


def test_loaded_and_local_count_as_bytes_moved() -> None:
    ledger = Ledger()
    reconcile(ledger, Counts(loaded=100), 0.0)
    ledger.sent = 5
    reconcile(ledger, Counts(loaded=102, local=1), 1.0)
    found = reconcile(ledger, Counts(loaded=103, local=1, recomputed=1), 1.0 + SETTLED)
    assert (found.sent, found.without_bytes, found.seen.loaded) == (5, 1, 3)


def test_what_was_loaded_before_the_router_came_does_not_count() -> None:
    ledger = Ledger()
    reconcile(ledger, Counts(loaded=1000), 0.0)
    ledger.sent = 3
    reconcile(ledger, Counts(loaded=1000), 0.5)
    assert reconcile(ledger, Counts(loaded=1000), 0.5 + SETTLED).without_bytes == 3


def test_polls_kept_are_bounded() -> None:
    ledger = Ledger()
    for turn in range(1000):
        ledger.sent += 1
        reconcile(ledger, Counts(loaded=ledger.sent), turn * 0.5)
    assert len(ledger.polls) <= limits.AUDIT_SETTLE_S / 0.5 + 2


def test_growth_is_reported_once() -> None:
    audit = Audit()
    assert audit.take(member(), Counts(), 0.0) is None
    assert audit.findings() == {}
    audit.sent("d", 0.1)
    assert audit.take(member(), Counts(), 1.0) is None
    found = audit.take(member(), Counts(), 1.0 + SETTLED)
    assert found is not None
    assert found.without_bytes == 1
    assert found.seen.found is False
    assert audit.take(member(), Counts(), 9.0) is None
    assert audit.findings()["d"].without_bytes == 1


def test_a_restart_is_no_evidence() -> None:
    audit = Audit()
    audit.take(member(), Counts(loaded=50), 0.0)
    audit.sent("d", 0.1)
    audit.take(member(), Counts(loaded=51), 1.0)
    audit.sent("d", 1.1)
    assert audit.take(member(life=2), Counts(), 2.0) is None
    assert audit.take(member(life=2), Counts(), 9.0) is None
    assert audit.findings()["d"].without_bytes == 0


def test_only_instances_with_open_questions_are_read() -> None:
    audit = Audit()
    assert audit.due([member()], 0.0) == [member()]
    audit.take(member(), Counts(), 0.0)
    assert audit.due([member()], 1.0) == []
    audit.sent("d", 5.0)
    assert audit.due([member()], 6.0) == [member()]
    assert audit.due([member()], 60.0) == []
    assert audit.due([member(life=2)], 60.0) == [member(life=2)]


def test_an_instance_with_a_connector_of_vllm_is_not_judged() -> None:
    audit = Audit()
    upstream = Member("d", "decode", "http://d:1", 1, "d-1", 1, "ready", {"connector": "nixl"})
    assert audit.due([upstream], 0.0) == []
    assert not audit.known("d")


def test_an_instance_that_left_is_forgotten() -> None:
    audit = Audit()
    audit.take(member(), Counts(), 0.0)
    audit.forget(set())
    assert not audit.known("d")
    audit.sent("d", 1.0)
    assert audit.findings() == {}
