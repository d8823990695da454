"""The connector's scheduler side with vLLM's own Request objects: every ending gives a pin back exactly once.

Streamed handoffs: test_connector_streams.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request, RequestStatus

from vllm_fleet.connector.jobs import HoldJob, LoadJob, ReleaseJob
from vllm_fleet.connector.meta import StepMetadata
from vllm_fleet.connector.scheduler import SchedulerSide
from vllm_fleet.core.env import RealEnv
from vllm_fleet.wire.control import Load
from vllm_fleet.wire.ticket import FIELD, Ticket, WorkerAddress, prompt_digest, unseal

TOKEN = bytes(range(32))
WORKERS = (WorkerAddress("127.0.0.1", 4000),)
BLOCK = 4
HOLD = {"do_remote_decode": True, "do_remote_prefill": False}


def side(engine: str) -> SchedulerSide:
    made = SchedulerSide(token=TOKEN, engine=engine, block_tokens=BLOCK, env=RealEnv())
    made.workers = WORKERS
    return made


def request(tokens: list[int], params: dict[str, Any] | None, **settings: Any) -> Request:
    sampling = SamplingParams(max_tokens=1, extra_args={"kv_transfer_params": params} if params else None)
    return Request("r", tokens, sampling, None, **settings)


def step(of: SchedulerSide) -> StepMetadata:
    return of.take_step(SchedulerOutput.make_empty())


def ticket_in(params: dict[str, Any]) -> Ticket:
    """The ticket that a prefill answer carries."""
    ticket = unseal(params[FIELD], TOKEN)
    assert isinstance(ticket, Ticket)
    return ticket


def prefilled(tokens: list[int]) -> tuple[dict[str, Any], list[HoldJob]]:
    """What a prefill instance answers and holds for a prompt."""
    prefill = side("p")
    asked = request(tokens, HOLD)
    asked.num_computed_tokens = len(tokens)
    asked.status = RequestStatus.FINISHED_LENGTH_CAPPED
    kept, params = prefill.on_finished(asked, list(range(10, 10 + -(-len(tokens) // BLOCK))))
    assert kept
    assert params is not None
    return params, step(prefill).holds


def test_a_finished_prefill_is_held_and_its_ticket_fits() -> None:
    params, holds = prefilled([1, 2, 3, 4, 5])
    ticket, digest = ticket_in(params), prompt_digest([1, 2, 3, 4, 5], None, None)
    assert holds == [HoldJob(ticket.transfer, "r", digest, (10, 11), 5)]
    assert (ticket.engine, ticket.tokens, ticket.prompt, ticket.workers) == ("p", 5, digest, WORKERS)


@pytest.mark.parametrize("status", [RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_ERROR])
def test_an_aborted_prefill_is_not_held(status: RequestStatus) -> None:
    prefill = side("p")
    asked = request([1, 2, 3], HOLD)
    asked.num_computed_tokens, asked.status = 3, status
    assert prefill.on_finished(asked, [10]) == (False, None)
    assert not prefill.has_jobs


def test_a_load_of_what_the_local_cache_lacks() -> None:
    params, _ = prefilled(list(range(10)))
    decode = side("d")
    asked = request(list(range(10)), params)
    decode.on_new_request(asked)
    assert decode.matched_tokens(asked, 4) == (6, True)
    assert decode.matched_tokens(asked, 4) == (6, True)  # asked again every step: free of side effects
    decode.on_allocated(asked, [70, 71, 72], 6)
    ticket = ticket_in(params)
    wanted = LoadJob(ticket.transfer, "r", WORKERS, "p", ticket.prompt, 10, (71, 72), 1, streamed=False)
    [load] = step(decode).loads
    assert dataclasses.replace(load, queued_s=0.0) == wanted
    decode.on_output(KVConnectorOutput(finished_recving={"r"}))
    assert decode.take_outcomes() == {"loaded": 1}
    assert decode.matched_tokens(asked, 0) == (0, False)  # preempted later: computed here, not loaded twice
    decode.on_allocated(asked, [70, 71, 72], 0)
    assert not decode.has_jobs


def test_a_failed_load_is_recomputed_and_counted() -> None:
    params, _ = prefilled(list(range(10)))
    decode = side("d")
    asked = request(list(range(10)), params)
    decode.on_new_request(asked)
    decode.on_allocated(asked, [70, 71, 72], 10)
    decode.on_output(KVConnectorOutput(invalid_block_ids={71}))
    decode.on_output(KVConnectorOutput(finished_recving={"r"}))
    assert decode.take_outcomes() == {"recomputed": 1}
    assert decode.matched_tokens(asked, 0) == (0, False)


@pytest.mark.parametrize("local", [9, 10])
def test_nothing_is_loaded_for_the_last_token(local: int) -> None:
    params, _ = prefilled(list(range(10)))
    decode = side("d")
    asked = request(list(range(10)), params)
    decode.on_new_request(asked)
    assert decode.matched_tokens(asked, local) == (0, False)
    decode.on_allocated(asked, [70, 71, 72], 0)
    assert step(decode).releases == [ReleaseJob(ticket_in(params).transfer, WORKERS)]
    assert decode.take_outcomes() == {"local": 1}


def test_an_abort_before_the_load_gives_the_pin_back() -> None:
    params, _ = prefilled(list(range(10)))
    decode = side("d")
    asked = request(list(range(10)), params)
    decode.on_new_request(asked)
    asked.status = RequestStatus.FINISHED_ABORTED
    assert decode.on_finished(asked, []) == (False, None)
    assert decode.has_jobs
    assert step(decode).releases == [ReleaseJob(ticket_in(params).transfer, WORKERS)]
    assert decode.take_outcomes() == {"dropped": 1}


def test_an_abort_during_the_load_cancels_it_once() -> None:
    params, _ = prefilled(list(range(10)))
    decode = side("d")
    asked = request(list(range(10)), params)
    decode.on_new_request(asked)
    decode.on_allocated(asked, [70, 71, 72], 10)
    step(decode)
    asked.status = RequestStatus.FINISHED_ABORTED
    assert decode.on_finished(asked, [70, 71, 72]) == (False, None)
    taken = step(decode)
    assert (taken.cancels, taken.releases) == (["r"], [])


@pytest.mark.parametrize(
    ("tokens", "settings"), [([9, *range(1, 10)], {}), (list(range(9)), {}), (list(range(10)), {"cache_salt": "other"})]
)
def test_a_ticket_of_another_prompt_is_refused_and_given_back(tokens: list[int], settings: dict[str, Any]) -> None:
    params, _ = prefilled(list(range(10)))
    decode = side("d")
    asked = request(tokens, params, **settings)
    decode.on_new_request(asked)
    assert decode.matched_tokens(asked, 0) == (0, False)
    assert decode.take_outcomes() == {"refused": 1}
    assert len(step(decode).releases) == 1


@pytest.mark.parametrize(
    "params", [{"do_remote_prefill": True}, {"do_remote_prefill": True, FIELD: "x" * 99}, {}, None]
)
def test_a_forged_ticket_costs_nothing(params: dict[str, Any] | None) -> None:
    decode = side("d")
    asked = request([1, 2, 3], params)
    decode.on_new_request(asked)
    assert decode.matched_tokens(asked, 0) == (0, False)
    decode.on_allocated(asked, [7], 0)
    assert not decode.has_jobs


def test_the_load_is_what_has_not_finished_and_what_is_held() -> None:
    prefill = side("p")
    asked = request(list(range(8)), HOLD)
    prefill.on_new_request(asked)
    assert prefill.load() == Load(1, 0)
    asked.num_computed_tokens = 8
    asked.status = RequestStatus.FINISHED_LENGTH_CAPPED
    prefill.on_finished(asked, [10, 11])
    assert prefill.load() == Load(0, 1), "until decode has taken its KV, or the lease is over"
    prefill.on_output(KVConnectorOutput(finished_sending={"r"}))
    assert prefill.load() == Load(0, 0)


def test_an_aborted_request_is_no_load() -> None:
    prefill = side("p")
    asked = request(list(range(8)), HOLD)
    prefill.on_new_request(asked)
    asked.status = RequestStatus.FINISHED_ABORTED
    prefill.on_finished(asked, [])
    assert prefill.load() == Load(0, 0)
