"""Phases of benchmarks/gpu_serving.py on an unloaded fleet: equal answers, what a handoff costs, TTFT."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from benchmarks.serving_load import Bench, RequestFailed, Stream, grown

HOLD = {"do_remote_decode": True, "do_remote_prefill": False}
ANSWERS = 6
ANSWER_TOKENS = 64
FAILURES_MAX = 3
STAMP_S = 5.0
Row = dict[str, float]
Arm = Callable[[int], Awaitable[Row]]


async def answers(bench: Bench, into: dict[str, Any]) -> None:
    """Greedy answers through the fleet and of a plain instance, and of that instance asked again (its prompt cached).

    The last is the measure for the first: another split of a prompt into steps can round otherwise.
    """
    found: dict[str, Any] = {"asked": ANSWERS, "tokens": ANSWER_TOKENS, "through_fleet": 0, "plain_again": 0}
    texts = set()
    for _ in range(ANSWERS):
        body = bench.body(bench.device.handoff_tokens[0] - 100, ANSWER_TOKENS, stream=False)
        plain, ours, again = [_text(await bench.post(name, body)) for name in ("plain-0", "router", "plain-0")]
        found["through_fleet"] += ours == plain
        found["plain_again"] += again == plain
        texts.add(plain)
    into |= found | {"distinct": len(texts)}


def _text(answer: Mapping[str, Any]) -> str:
    text: str = answer["choices"][0]["text"]
    return text


class Handoffs:
    """What decode needs on top of a request whose KV it has, by connector and by way of asking; seconds.

    A prompt of whole blocks and one token: with its KV local, decode computes one token, as it does after a handoff.
    """

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.arms: dict[str, Arm] = {}
        if bench.started.has("router", "prefill", "decode"):
            self.arms["ours, streamed"] = self._streamed
            self.arms["ours, sequential"] = lambda tokens: self._sequential("prefill", "decode", tokens)
        if bench.started.has("nixl-prefill", "nixl-decode"):
            self.arms["NixlConnector"] = lambda tokens: self._sequential("nixl-prefill", "nixl-decode", tokens)

    def tokens(self, tokens: int) -> int:
        """The largest number of whole blocks and one token that is at most ``tokens``."""
        return tokens - self._bench.device.block + 1

    async def _streamed(self, tokens: int) -> Row:
        body = self._bench.body(self.tokens(tokens), 1)
        answer = await self._bench.stream("router", body)
        if answer.mode != "streamed":
            raise RequestFailed(f"not handed over but {answer.mode}")
        stamps = await _stamps(self._bench, answer.headers["x-request-id"])
        local = await self._local("decode", body)
        after_s = stamps["first_byte"] - stamps["prefill_answered"]
        prefill_s = stamps["prefill_answered"] - stamps["prefill_sent"]
        return _row(after_s, local, prefill_s, answer.ttft_s)

    async def _sequential(self, prefill: str, decode: str, tokens: int) -> Row:
        bench = self._bench
        body = bench.body(self.tokens(tokens), 1)
        plain = {key: value for key, value in body.items() if not key.startswith("stream")}
        began = time.perf_counter()
        held = await bench.post(prefill, {**plain, "kv_transfer_params": HOLD})
        answered = time.perf_counter()
        answer = await bench.stream(decode, {**body, "kv_transfer_params": held["kv_transfer_params"]})
        local = await self._local(decode, body)
        return _row(answer.ttft_s, local, answered - began, answer.at[0] - began)

    async def _local(self, decode: str, body: Mapping[str, Any]) -> Stream:
        await asyncio.sleep(0.02)  # the handoff's own end, on both sides
        return await self._bench.stream(decode, body)


def _row(after_s: float, local: Stream, prefill_s: float, ttft_s: float) -> Row:
    return {
        "extra_s": after_s - local.ttft_s,
        "after_prefill_s": after_s,
        "local_s": local.ttft_s,
        "prefill_s": prefill_s,
        "ttft_s": ttft_s,
        "local_cached": local.cached,
    }


async def _stamps(bench: Bench, request_id: str) -> dict[str, float]:
    """The router's timeline once prefill has answered, which can be after the answer's end."""
    until = time.monotonic() + STAMP_S
    while time.monotonic() < until:
        stamps = await bench.timeline(request_id)
        if "prefill_answered" in stamps:
            return stamps
        await asyncio.sleep(0.005)
    raise RequestFailed(f"{request_id}: prefill has not answered {STAMP_S:.0f} s after decode")


async def handoffs(bench: Bench, rounds: int, until: float, into: dict[str, Any]) -> None:
    """Phase a: every arm hands a prompt of every length over, again and again.

    ``not_local`` counts rounds whose second request found less than the whole prompt in decode's cache. That KV came
    from prefill is in the connectors' counters: vLLM's usage says 0 of a request with kv_transfer_params.
    """
    made, before = Handoffs(bench), await bench.counters()
    found = await interleaved(made.arms, bench.device.handoff_tokens, rounds, until)
    rows = []
    for (arm, length), raw in found.rows.items():
        tokens = made.tokens(length)
        not_local = sum(row["local_cached"] < tokens - 1 for row in raw)
        rows.append({"arm": arm, "tokens": tokens, **_summary(raw), "not_local": not_local, "raw": raw})
    into |= {"rows": rows, "failed": found.failed, "counters": grown(before, await bench.counters())}


def _summary(rows: Sequence[Row]) -> dict[str, float]:
    made: dict[str, float] = {"rounds": len(rows)}
    if rows:
        for key in ("extra_s", "after_prefill_s", "local_s", "prefill_s", "ttft_s"):
            made[f"{key[:-2]}_ms"] = round(1e3 * statistics.median(row[key] for row in rows), 3)
        made["extra_ms_worst"] = round(1e3 * max(row["extra_s"] for row in rows), 3)
    return made


async def first_tokens(bench: Bench, rounds: int, until: float, into: dict[str, Any]) -> None:
    """Phase b: TTFT through the router beside one plain instance, nothing else running."""

    def arm(name: str) -> Arm:
        async def ask(tokens: int) -> Row:
            answer = await bench.stream(name, bench.body(tokens, 2))
            if name == "router" and answer.mode != "streamed":
                raise RequestFailed(f"not handed over but {answer.mode}")
            return {"ttft_s": answer.ttft_s}

        return ask

    arms = {name: arm(name) for name in ("plain-0", "router")}
    found = await interleaved(arms, bench.device.ttft_tokens, rounds, until)
    rows = []
    for tokens in bench.device.ttft_tokens:
        plain, ours = ([row["ttft_s"] for row in found.rows[name, tokens]] for name in arms)
        if plain and ours:
            row = {"tokens": tokens, "rounds": len(ours), "plain_ms": round(1e3 * statistics.median(plain), 3)}
            row["fleet_ms"] = round(1e3 * statistics.median(ours), 3)
            row["ratio"] = round(statistics.median(ours) / statistics.median(plain), 4)
            rows.append(row | {"raw": {"plain_s": plain, "fleet_s": ours}})
    into |= {"rows": rows, "failed": found.failed}


class Interleaved:
    """Rows by arm and number of tokens, and what failed."""

    def __init__(self, arms: Mapping[str, Arm], lengths: Sequence[int]) -> None:
        self.rows: dict[tuple[str, int], list[Row]] = {(arm, tokens): [] for arm in arms for tokens in lengths}
        self.failed: dict[str, list[str]] = {arm: [] for arm in arms}


async def interleaved(arms: Mapping[str, Arm], lengths: Sequence[int], rounds: int, until: float) -> Interleaved:
    """Each round asks each arm for each length once, in turning order, until ``until`` (time.monotonic()).

    The round before the first is not kept. An arm that has failed FAILURES_MAX times is left out from then on.
    """
    found, names = Interleaved(arms, lengths), list(arms)
    for number in range(-1, rounds):
        for tokens in lengths:
            names.append(names.pop(0))
            for name in [name for name in names if len(found.failed[name]) < FAILURES_MAX]:
                if time.monotonic() > until:
                    return found
                try:
                    row = await arms[name](tokens)
                except RequestFailed as error:
                    found.failed[name].append(str(error))
                    continue
                if number >= 0:
                    found.rows[name, tokens].append(row)
    return found
