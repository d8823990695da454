"""Groups of workers, each a process with a GPU of its own: how long forming, noticing a death and forming anew take.

    python -m benchmarks.gpu_groups [--backend gloo] [--rounds 21] [--json FILE]

A pair and a group of two, side by side, on two GPUs of one host, with a real controller: each round, both sides form
anew while both live (``form``); GPU 1's process is killed, in every other round while the other side waits for it in a
call (``notice``: until the other side knows); and a fresh process takes its place, started and waiting beforehand, as a
launcher's start of an engine is not what is measured here (``re-form``: from the kill until both are in). Each epoch is
proved with broadcasts both ways, sends and 64 MiB. Needs torch, msgspec, aiohttp, httptools, uvloop, and with nccl
nccl4py; with ``--backend gloo`` no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tests.contract.group_fleet import Controller, Worker, all_ask

SPARES_AT_ONCE = max(1, (os.cpu_count() or 1) // 4)
"""Processes that are being started, for each kind of group, while rounds are measured."""
PROOF_BYTES = 64 << 20
SHOWN = (
    ("form", "asked to both in, both alive and warm"),
    ("notice", "SIGKILL to noticed by the other side"),
    ("notice, idle", "... which was not calling"),
    ("notice, in a call", "... which was receiving"),
    ("re-form", "SIGKILL to both in, with a fresh process"),
    ("re-form, from noticed", "... counted from the notice"),
    ("broadcast of 64 MiB", "between the two"),
)

Figures = dict[str, list[float]]


class Arena:
    """One kind of group: a process on GPU 0 that stays, one on GPU 1 that is killed, and spares for it."""

    def __init__(self, url: str, group: str, library: str, rounds: int) -> None:
        self._url, self._group, self._library = url, group, library
        self.figures: Figures = {name: [] for name, _ in SHOWN}
        self._started: list[Worker] = []
        self._starting = ThreadPoolExecutor(SPARES_AT_ONCE)
        self._stays = self._starting.submit(self._start, 0)
        self._spares = [self._starting.submit(self._start, 1) for _ in range(rounds + 1)]

    def begin(self) -> None:
        """Form for the first time."""
        self.stays, self.other = self._stays.result(), self._spares.pop(0).result()
        self._use(self.stays, "a")
        self._use(self.other, "b")
        asked = self._form()
        self.first_s = max(self.stays.answered_at, self.other.answered_at) - asked

    def round(self, in_call: bool) -> None:
        """Form anew, kill, notice, form with a fresh process."""
        both = [self.stays, self.other]
        self._expect_end(self.stays.ask("receive", group=self._group, source=1, seconds=0.02))
        self._expect_end(self.other.ask("wait", group=self._group))
        asked = self._form()
        self.figures["form"].append(max(one.answered_at for one in both) - asked)
        self._prove()
        spare = self._spares.pop(0).result()
        self._use(spare, "b")
        if in_call:
            self.stays.tell("receive", group=self._group, source=1)
        else:
            self.stays.tell("wait", group=self._group)
        time.sleep(0.05)  # it is at it
        killed = time.monotonic()
        self.other.process.kill()
        self._expect_end(self.stays.answer())
        noticed = self.stays.answered_at
        for name in ("notice", "notice, in a call" if in_call else "notice, idle"):
            self.figures[name].append(noticed - killed)
        self.other.close()
        self.other = spare
        self._form()
        formed = max(self.stays.answered_at, spare.answered_at)
        self.figures["re-form"].append(formed - killed)
        self.figures["re-form, from noticed"].append(formed - noticed)
        self._prove()

    def close(self) -> None:
        """End every process, those too that are being started."""
        self._starting.shutdown(cancel_futures=True)
        for worker in self._started:
            worker.close()

    def _start(self, device: int) -> Worker:
        worker = Worker(self._url, self._library, device)
        self._started.append(worker)
        worker.until_ready()
        return worker

    def _use(self, worker: Worker, name: str) -> None:
        worker.ask("use", name=name, group=self._group, members=["a", "b"])

    def _form(self) -> float:
        asked = time.monotonic()
        answers = all_ask([self.stays, self.other], "form", group=self._group, seconds=30.0)
        if not all(isinstance(one, dict) and one["members"] == ["a", "b"] for one in answers):
            raise RuntimeError(f"{self._group} did not form: {answers}")
        return asked

    def _prove(self) -> None:
        for root in (0, 1):
            for rank, worker in enumerate((self.stays, self.other)):
                worker.tell("timed_broadcast", group=self._group, root=root, value=3 + rank, nbytes=PROOF_BYTES)
            answers = [worker.answer() for worker in (self.stays, self.other)]
            if [one["value"] for one in answers] != [3 + root] * 2:
                raise RuntimeError(f"a broadcast brought something else: {answers}")
        self.figures["broadcast of 64 MiB"].append(max(one["s"] for one in answers))
        for giver, taker, rank in ((self.stays, self.other, 0), (self.other, self.stays, 1)):
            giver.tell("send", group=self._group, to=1 - rank, value=9)
            received = taker.ask("receive", group=self._group, source=rank)
            if received != 9 or giver.answer() is not None:
                raise RuntimeError(f"what was sent did not arrive: {received}")

    @staticmethod
    def _expect_end(answer: Any) -> None:
        text = answer["reason"] if isinstance(answer, dict) else answer
        if not isinstance(text, str) or not ("epoch" in text or "DeadlineExceeded" in text):
            raise RuntimeError(f"the end of an epoch was not noticed: {answer}")


def measure(library: str, rounds: int) -> dict[str, Any]:
    """Both kinds at once."""
    with tempfile.TemporaryDirectory() as folder:
        controller = Controller(Path(folder))
        arenas: dict[str, Arena] = {}
        failures: list[BaseException] = []

        def work(kind: str, group: str) -> None:
            try:
                arena = arenas[kind] = Arena(controller.url, group, library, rounds)
                arena.begin()
                for number in range(rounds):
                    arena.round(in_call=bool(number % 2))
            except BaseException as error:  # noqa: BLE001 - raised below
                failures.append(error)

        threads = [threading.Thread(target=work, args=given) for given in (("pair", "pair"), ("group of 2", "g"))]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if failures:
                raise failures[0]
        finally:
            for arena in arenas.values():
                arena.close()
            controller.kill()
    return {
        kind: {"form, first time in both processes": round(arena.first_s, 4)}
        | {name: summary(took) for name, took in arena.figures.items()}
        for kind, arena in arenas.items()
    }


def summary(took: list[float]) -> dict[str, Any]:
    """Seconds."""
    ordered = sorted(took)
    return {
        "n": len(took),
        "median_s": round(statistics.median(took), 4),
        "p90_s": round(ordered[math.ceil(0.9 * len(ordered)) - 1], 4),
        "max_s": round(ordered[-1], 4),
        "all_s": [round(one, 4) for one in took],
    }


def machine(library: str) -> dict[str, Any]:
    cuda = library == "nccl"
    return {
        "backend": library,
        "gpus": [torch.cuda.get_device_name(number) for number in range(2)] if cuda else [],
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Forming, losing and re-forming groups of workers.")
    parser.add_argument("--backend", choices=("nccl", "gloo"), default="nccl")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    began = time.monotonic()
    kinds = measure(given.backend, given.rounds)
    found = {"machine": machine(given.backend), "seconds": round(time.monotonic() - began, 1), "kinds": kinds}
    if given.json:
        given.json.write_text(json.dumps(found, separators=(",", ":")) + "\n")
    print(f"{given.backend}, {given.rounds} rounds, {found['seconds']} s; medians (p90) in ms")
    print(f"{'':24}" + "".join(f"{kind:>20}" for kind in kinds))
    for name, about in SHOWN:
        cells = (f"{one[name]['median_s'] * 1e3:.0f} ({one[name]['p90_s'] * 1e3:.0f})" for one in kinds.values())
        print(f"{name:24}" + "".join(f"{cell:>20}" for cell in cells) + f"   {about}")
    firsts = (f"{one['form, first time in both processes'] * 1e3:.0f}" for one in kinds.values())
    print(f"{'form, first time':24}" + "".join(f"{cell:>20}" for cell in firsts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
