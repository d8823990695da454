"""Streamed handoffs on the connector's scheduler side, with vLLM's own Request and SchedulerOutput objects."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Sequence
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request, RequestStatus

from vllm_fleet.connector.jobs import GrowJob, HoldJob, LoadJob, ReleaseJob
from vllm_fleet.connector.meta import StepMetadata
from vllm_fleet.connector.scheduler import SchedulerSide
from vllm_fleet.core.env import RealEnv
from vllm_fleet.wire.ticket import FIELD, StreamTicket, WorkerAddress, prompt_digest, seal, stream_params

TOKEN = bytes(range(32))
WORKERS = (WorkerAddress("127.0.0.1", 4000), WorkerAddress("127.0.0.1", 4001))
BLOCK = 4
PROMPT = list(range(1, 11))
DIGEST = prompt_digest(PROMPT, None, None)
_numbers = itertools.count()


def side(engine: str) -> SchedulerSide:
    made = SchedulerSide(token=TOKEN, engine=engine, block_tokens=BLOCK, env=RealEnv())
    made.workers = WORKERS
    return made


def ticket(engine: str = "p") -> StreamTicket:
    """What a router mints."""
    return StreamTicket(f"t{next(_numbers)}", engine, WORKERS)


def asked(of: StreamTicket, *, prefill: bool, name: str = "r", tokens: Sequence[int] = PROMPT, **more: Any) -> Request:
    """A request that came with a stream ticket."""
    params = stream_params(of, TOKEN)[0 if prefill else 1]
    sampling = SamplingParams(max_tokens=1, extra_args={"kv_transfer_params": params})
    return Request(name, list(tokens), sampling, None, **more)


def step(
    *new: tuple[Request, int, list[int], int],
    more: Sequence[tuple[Request, int, list[int] | None, int]] = (),
    resumed: Sequence[str] = (),
) -> SchedulerOutput:
    """What vLLM schedules: requests, how many of their tokens are computed, further blocks, tokens of this step."""
    output = SchedulerOutput.make_empty()
    output.scheduled_new_reqs = [
        NewRequestData(r.request_id, r.prompt_token_ids, [], None, None, (blocks,), done, None)
        for r, done, blocks, _ in new
    ]
    output.scheduled_cached_reqs = CachedRequestData(
        [r.request_id for r, *_ in more],
        set(resumed),
        [],
        {},
        [None if blocks is None else (blocks,) for _, _, blocks, _ in more],
        [done for _, done, _, _ in more],
        [0 for _ in more],
    )
    output.num_scheduled_tokens = {r.request_id: count for r, _, _, count in (*new, *more)}
    output.total_num_scheduled_tokens = sum(output.num_scheduled_tokens.values())
    for request, done, _, count in (*new, *more):
        request.status, request.num_computed_tokens = RequestStatus.RUNNING, done + count
    return output


def grows(of: StepMetadata) -> list[GrowJob]:
    """Without the time, which no test knows."""
    return [dataclasses.replace(job, queued_s=0.0) for job in of.grows]


def empty(of: SchedulerSide) -> StepMetadata:
    return of.take_step(step())


def finish(of: SchedulerSide, request: Request, blocks: list[int], status: RequestStatus) -> tuple[bool, Any]:
    request.status = status
    return of.on_finished(request, blocks)


# Prefill --------------------------------------------------------------------------------------------------------------


def test_chunks_grow_and_the_finished_request_is_held() -> None:
    prefill, minted = side("p"), ticket()
    request = asked(minted, prefill=True)
    prefill.on_new_request(request)
    assert empty(prefill).grows == [], "it waits"
    first = prefill.take_step(step((request, 0, [10], 3)))
    assert grows(first) == [GrowJob(minted.transfer, "r", DIGEST, (10,), 3)]
    second = prefill.take_step(step(more=[(request, 3, [11, 12], 6)]))
    assert grows(second) == [GrowJob(minted.transfer, "r", DIGEST, (11, 12), 9)]
    third = prefill.take_step(step(more=[(request, 9, None, 1)]))
    assert grows(third) == [GrowJob(minted.transfer, "r", DIGEST, (), 10)]
    assert not prefill.has_jobs
    assert finish(prefill, request, [10, 11, 12], RequestStatus.FINISHED_LENGTH_CAPPED) == (True, None)
    assert prefill.has_jobs
    last = empty(prefill)
    assert last.holds == [HoldJob(minted.transfer, "r", DIGEST, (10, 11, 12), 10)]
    assert (last.grows, last.revoked) == ([], [])
    assert prefill.take_outcomes() == {"held": 1}


def test_what_its_own_cache_has_is_ready_with_the_first_step() -> None:
    prefill, minted = side("p"), ticket()
    request = asked(minted, prefill=True)
    prefill.on_new_request(request)
    taken = prefill.take_step(step((request, 8, [10, 11, 12], 2)))
    assert grows(taken) == [GrowJob(minted.transfer, "r", DIGEST, (10, 11, 12), 10)]


def test_answer_tokens_are_no_part_of_the_prompt() -> None:
    prefill, minted = side("p"), ticket()
    request = asked(minted, prefill=True)
    prefill.on_new_request(request)
    prefill.take_step(step((request, 0, [10, 11, 12], 10)))
    taken = prefill.take_step(step(more=[(request, 10, [13], 3)]))
    assert grows(taken) == [GrowJob(minted.transfer, "r", DIGEST, (13,), 10)]
    assert finish(prefill, request, [10, 11, 12, 13], RequestStatus.FINISHED_STOPPED) == (True, None)
    assert empty(prefill).holds == [HoldJob(minted.transfer, "r", DIGEST, (10, 11, 12), 10)]


def test_jobs_say_how_long_the_request_has_been_here() -> None:
    arrived = time.time() - 5
    prefill, decode = side("p"), side("d")
    there, here = (asked(ticket(), prefill=is_prefill, arrival_time=arrived) for is_prefill in (True, False))
    prefill.on_new_request(there)
    decode.on_new_request(here)
    decode.on_allocated(here, [70, 71, 72], 10)
    [grow], [load] = prefill.take_step(step((there, 0, [10], 3))).grows, empty(decode).loads
    assert 5 <= grow.queued_s < 15
    assert 5 <= load.queued_s < 15


def test_the_digest_has_the_salt() -> None:
    prefill, minted = side("p"), ticket()
    request = asked(minted, prefill=True, cache_salt="tenant")
    prefill.on_new_request(request)
    [grow] = prefill.take_step(step((request, 0, [10], 3))).grows
    assert grow.prompt == prompt_digest(PROMPT, "tenant", None)


def test_two_streams_in_one_step() -> None:
    prefill, minted = side("p"), [ticket(), ticket()]
    requests = [asked(each, prefill=True, name=name) for each, name in zip(minted, "ab", strict=True)]
    for request in requests:
        prefill.on_new_request(request)
    prefill.take_step(step((requests[0], 0, [10], 4)))
    taken = prefill.take_step(step((requests[1], 0, [20], 2), more=[(requests[0], 4, [11], 4)]))
    assert sorted(grows(taken), key=lambda grow: grow.request) == [
        GrowJob(minted[0].transfer, "a", DIGEST, (11,), 8),
        GrowJob(minted[1].transfer, "b", DIGEST, (20,), 2),
    ]


@pytest.mark.parametrize("status", [RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_ERROR])
@pytest.mark.parametrize("done", [0, 4, 10])
def test_an_aborted_stream_is_revoked(status: RequestStatus, done: int) -> None:
    prefill, minted = side("p"), ticket()
    request = asked(minted, prefill=True)
    prefill.on_new_request(request)
    if done:
        prefill.take_step(step((request, 0, [10, 11, 12], done)))
    assert finish(prefill, request, [10, 11, 12], status) == (False, None)
    taken = empty(prefill)
    assert (taken.revoked, taken.holds, taken.grows) == ([minted.transfer], [], [])
    assert prefill.take_outcomes() == {}
    assert empty(prefill).revoked == []


def test_a_stream_that_stops_before_its_prompt_is_complete_is_revoked() -> None:
    prefill, minted = side("p"), ticket()
    request = asked(minted, prefill=True)
    prefill.on_new_request(request)
    prefill.take_step(step((request, 0, [10, 11], 8)))
    assert finish(prefill, request, [10, 11], RequestStatus.FINISHED_STOPPED) == (False, None)
    assert empty(prefill).revoked == [minted.transfer]


def check_revoked(prefill: SchedulerSide, request: Request, taken: StepMetadata, minted: StreamTicket) -> None:
    """It was revoked in this step, and nothing is heard of it again."""
    assert (taken.revoked, taken.grows) == ([minted.transfer], [])
    later = prefill.take_step(step(more=[(request, 4, [22], 6)]))
    assert (later.revoked, later.grows) == ([], [])
    assert finish(prefill, request, [20, 21, 22], RequestStatus.FINISHED_LENGTH_CAPPED) == (False, None)
    last = empty(prefill)
    assert (last.revoked, last.holds, last.grows) == ([], [], [])
    assert prefill.take_outcomes() == {}


def test_a_preempted_stream_is_revoked_once_and_holds_nothing_later() -> None:
    prefill, minted = side("p"), ticket()
    request = asked(minted, prefill=True)
    prefill.on_new_request(request)
    prefill.take_step(step((request, 0, [10], 4)))
    request.status, request.num_computed_tokens = RequestStatus.PREEMPTED, 0
    taken = empty(prefill)
    check_revoked(prefill, request, taken, minted)


def test_a_stream_preempted_and_resumed_before_the_step_is_revoked() -> None:
    """As after reset_prefix_cache(reset_running_requests=True): vLLM resumes it in the very next step."""
    prefill, minted = side("p"), ticket()
    request = asked(minted, prefill=True)
    prefill.on_new_request(request)
    prefill.take_step(step((request, 0, [10], 4)))
    taken = prefill.take_step(step(more=[(request, 0, [20], 4)], resumed=["r"]))
    check_revoked(prefill, request, taken, minted)


def test_a_stream_resumed_as_if_it_were_new_is_revoked() -> None:
    """As with vLLM's second model runner, which is told of resumed requests as of new ones."""
    prefill, minted = side("p"), ticket()
    request = asked(minted, prefill=True)
    prefill.on_new_request(request)
    prefill.take_step(step((request, 0, [10], 4)))
    taken = prefill.take_step(step((request, 0, [20], 4)))
    check_revoked(prefill, request, taken, minted)


def refused(prefill: SchedulerSide, request: Request) -> None:
    """The request is computed as any other, and nobody hears of it."""
    prefill.on_new_request(request)
    assert prefill.take_outcomes() == {"refused": 1}
    taken = prefill.take_step(step((request, 0, [30, 31, 32], 10)))
    assert (taken.grows, taken.revoked) == ([], [])
    assert finish(prefill, request, [30, 31, 32], RequestStatus.FINISHED_LENGTH_CAPPED) == (False, None)
    assert not prefill.has_jobs


def test_a_ticket_of_another_engine_is_refused() -> None:
    refused(side("p"), asked(ticket("another"), prefill=True))


def test_a_ticket_of_other_workers_is_refused() -> None:
    refused(side("p"), asked(StreamTicket("t", "p", WORKERS[:1]), prefill=True))


@pytest.mark.parametrize("running", [True, False])
def test_a_ticket_is_good_for_one_request(running: bool) -> None:
    prefill, minted = side("p"), ticket()
    first = asked(minted, prefill=True, name="first")
    prefill.on_new_request(first)
    prefill.take_step(step((first, 0, [10, 11, 12], 10)))
    if not running:
        finish(prefill, first, [10, 11, 12], RequestStatus.FINISHED_LENGTH_CAPPED)
        assert [job.request for job in empty(prefill).holds] == ["first"]
        prefill.take_outcomes()
    refused(prefill, asked(minted, prefill=True, name="second"))


@pytest.mark.parametrize("sealed", ["x" * 99, seal(StreamTicket("t", "p", WORKERS), bytes(32)), None, 7])
def test_a_forged_ticket_is_refused(sealed: object) -> None:
    params = {"do_remote_decode": True, "do_remote_prefill": False, FIELD: sealed}
    sampling = SamplingParams(max_tokens=1, extra_args={"kv_transfer_params": params})
    refused(side("p"), Request("r", PROMPT, sampling, None))


# Decode ---------------------------------------------------------------------------------------------------------------


def test_decode_loads_the_prompt_while_it_is_computed() -> None:
    decode, minted = side("d"), ticket()
    request = asked(minted, prefill=False)
    decode.on_new_request(request)
    assert decode.matched_tokens(request, 4) == (6, True)
    decode.on_allocated(request, [70, 71, 72], 6)
    wanted = LoadJob(minted.transfer, "r", WORKERS, "p", DIGEST, 10, (71, 72), 1, streamed=True)
    [load] = empty(decode).loads
    assert dataclasses.replace(load, queued_s=0.0) == wanted
    decode.on_output(KVConnectorOutput(finished_recving={"r"}))
    assert decode.take_outcomes() == {"loaded": 1}


def test_the_digest_that_decode_wants_has_the_salt() -> None:
    decode = side("d")
    request = asked(ticket(), prefill=False, cache_salt="tenant")
    decode.on_new_request(request)
    decode.on_allocated(request, [70, 71, 72], 10)
    [load] = empty(decode).loads
    assert load.prompt == prompt_digest(PROMPT, "tenant", None)


def test_a_stream_that_decode_does_not_need_is_given_up() -> None:
    decode, minted = side("d"), ticket()
    request = asked(minted, prefill=False)
    decode.on_new_request(request)
    assert decode.matched_tokens(request, 9) == (0, False)
    decode.on_allocated(request, [70, 71, 72], 0)
    assert empty(decode).releases == [ReleaseJob(minted.transfer, WORKERS)]
    assert decode.take_outcomes() == {"local": 1}


def test_a_stream_aborted_before_it_is_loaded_is_given_up() -> None:
    decode, minted = side("d"), ticket()
    request = asked(minted, prefill=False)
    decode.on_new_request(request)
    assert finish(decode, request, [], RequestStatus.FINISHED_ABORTED) == (False, None)
    assert empty(decode).releases == [ReleaseJob(minted.transfer, WORKERS)]


def test_a_stream_aborted_while_it_is_loaded_is_cancelled() -> None:
    decode = side("d")
    request = asked(ticket(), prefill=False)
    decode.on_new_request(request)
    decode.on_allocated(request, [70, 71, 72], 10)
    empty(decode)
    assert finish(decode, request, [70, 71, 72], RequestStatus.FINISHED_ABORTED) == (False, None)
    taken = empty(decode)
    assert (taken.cancels, taken.releases, taken.holds, taken.revoked) == (["r"], [], [], [])
