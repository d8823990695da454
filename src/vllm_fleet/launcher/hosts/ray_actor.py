"""The part of the Ray launcher that runs on a node: an actor that owns one keeper, and a look at the nodes.

Everything said is JSON or plain bytes: Ray pickles what it carries, and so it carries no object of ours. Calls may be
repeated: a signal twice is as good as once, and ``follow`` says what it is asked for by offset.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from typing import IO, Any

import msgspec
from msgspec import Struct

from vllm_fleet.core import limits
from vllm_fleet.launcher import leftovers, processes
from vllm_fleet.launcher.child import MARK
from vllm_fleet.launcher.hosts import keeper
from vllm_fleet.launcher.hosts.keeper import Began, Ended, Failed
from vllm_fleet.launcher.leftovers import Leftover
from vllm_fleet.launcher.processes import ProcessId

READ_BYTES = 64 << 10
REST_S = 1.0  # for the last words of a process to be read, after its end
KILL_S = 2.0
ORPHANED = -int(signal.SIGKILL)


class NodeRow(Struct, frozen=True):
    """One node, as Ray knows it."""

    id: str
    address: str
    alive: bool
    death: str
    total: dict[str, float]
    free: dict[str, float]


class News(Struct, frozen=True):
    """What ``Guard.follow`` says beside the bytes."""

    offset: int
    """Of the first byte that comes with it; greater than asked for where some were lost."""
    ended: int | None = None
    reason: str = ""


decode_nodes = msgspec.json.Decoder(list[NodeRow]).decode
decode_news = msgspec.json.Decoder(News).decode
_encode = msgspec.json.Encoder().encode


def nodes() -> bytes:
    """Every node and what is free on it: a list of NodeRow in JSON. Runs inside the cluster.

    What is free on each node has no public call in Ray 2.60; where the private one is missing, all counts as free, and
    an actor that finds no room says so later.
    """
    import ray
    from ray._private import state

    available = getattr(state, "available_resources_per_node", None)
    free: dict[str, dict[str, float]] = available() if available is not None else {}
    rows = []
    for node in ray.nodes():
        total = dict(node.get("Resources") or {})
        one = NodeRow(
            node["NodeID"],
            node["NodeManagerAddress"],
            bool(node["Alive"]),
            str(node.get("DeathReasonMessage") or ""),
            total,
            dict(free.get(node["NodeID"], total if available is None else {})),
        )
        rows.append(one)
    return bytes(_encode(rows))


class Guard:
    """One process on this node. Ray runs its methods in several threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._log = bytearray()
        self._offset = 0
        self._report: Began | Failed | None = None
        self._ended: int | None = None
        self._reason = ""
        self._orders: IO[bytes] | None = None
        self._over, self._remembering = threading.Event(), threading.Lock()
        self._tree: set[ProcessId] = set()
        self._leftovers: set[Leftover] = set()

    def start(self, order: bytes, wait_s: float) -> bytes:
        """Start a keeper's Order; Began or Failed, as a line. The process is killed when this actor ends."""
        reports, theirs = os.pipe()
        words, words_in = os.pipe()
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, theirs)
            stack.callback(os.close, words_in)
            starter = subprocess.Popen(
                [sys.executable, "-m", keeper.__name__, str(theirs)], stdin=subprocess.PIPE, stdout=words_in,
                stderr=subprocess.STDOUT, pass_fds=(theirs,), start_new_session=True,
            )  # fmt: skip
        assert starter.stdin is not None
        self._orders = starter.stdin
        talker = threading.Thread(target=self._read_words, args=(words,), name="fleet-words", daemon=True)
        talker.start()
        threading.Thread(target=self._read_reports, args=(reports, talker), name="fleet-reports", daemon=True).start()
        with contextlib.suppress(BrokenPipeError):
            self._orders.write(order)
            self._orders.flush()
        with self._changed:
            known = self._changed.wait_for(lambda: self._report is not None or self._ended is not None, wait_s)
            report = self._report
        starter.wait(KILL_S)  # it has forked, or failed
        if report is None:
            silent = f"its keeper said nothing within {wait_s:g} s"
            report = Failed("its keeper ended before it could start it" if known else silent)
        return keeper.encode_line(report)

    def follow(self, offset: int, wait_s: float) -> tuple[bytes, bytes]:
        """What the process wrote from ``offset`` on, as soon as there is some, or it ended, or ``wait_s`` are over; and
        News. Bytes before ``offset`` are forgotten."""
        with self._changed:
            if offset > self._offset:
                del self._log[: offset - self._offset]
                self._offset = offset
            self._changed.wait_for(lambda: self._log or self._ended is not None, wait_s)
            words = bytes(self._log[:READ_BYTES])
            over = len(words) == len(self._log)
            news = News(self._offset, self._ended if over else None, self._reason)
        return words, bytes(_encode(news))

    def send(self, signum: int) -> None:
        """Signal it and its helpers."""
        with contextlib.suppress(OSError, ValueError), self._changed:
            if self._orders is not None:
                self._orders.write(keeper.encode_line(keeper.Send(signum)))
                self._orders.flush()

    def _read_words(self, words: int) -> None:
        with open(words, "rb", buffering=0) as stream:
            while read := stream.read(READ_BYTES):
                with self._changed:
                    self._log += read
                    surplus = len(self._log) - limits.REMOTE_LOG_BYTES_MAX
                    if surplus > 0:
                        del self._log[:surplus]
                        self._offset += surplus
                    self._changed.notify_all()

    def _read_reports(self, reports: int, talker: threading.Thread) -> None:
        code, reason = ORPHANED, "its keeper was killed"
        with open(reports, "rb") as stream:
            for line in stream:
                report = keeper.decode_report(line)
                if isinstance(report, Ended):
                    code, reason = report.code, ""
                else:
                    with self._changed:
                        self._report = report
                        self._changed.notify_all()
                if isinstance(report, Began):
                    threading.Thread(target=self._watch, args=(report,), name="fleet-watch", daemon=True).start()
        self._over.set()
        if reason and isinstance(self._report, Began):
            self._clean_up(self._report)
        talker.join(REST_S)
        with self._changed:
            self._ended, self._reason = code, reason
            self._changed.notify_all()

    def _watch(self, began: Began) -> None:
        """Remember now and then what there is to clean up, as the keeper does: it may die with the process."""
        while True:
            self._remember(began)
            if self._over.wait(keeper.REMEMBER_EVERY_S):
                return

    def _remember(self, began: Began) -> None:
        first = ProcessId(began.pid, began.start)
        with self._remembering:
            known = {first} | self._tree | processes.marked(MARK, began.mark)
            self._tree = processes.tree(first.pid, processes.table(), known)
            self._leftovers |= leftovers.collect(self._tree)

    def _clean_up(self, began: Began) -> None:
        """What the keeper would have done."""
        self._remember(began)
        processes.kill(self._tree, KILL_S)
        leftovers.remove(self._leftovers)
        shutil.rmtree(began.site.folder, ignore_errors=True)


def check_connected() -> None:
    """ConnectionError when this process is no driver any more: asked for something, Ray would start a new cluster."""
    import ray

    if not ray.is_initialized():
        raise ConnectionError("the connection to the Ray cluster is closed")


def options(needs: dict[str, float], node_id: str) -> dict[str, Any]:
    """Ray's options of a Guard that holds what its process needs, on this node and no other."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {
        "num_cpus": needs.get("CPU", 0.0),
        "num_gpus": needs.get("GPU", 0.0),
        "resources": {kind: amount for kind, amount in needs.items() if kind not in ("CPU", "GPU") and amount},
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False),
        "max_restarts": 0,
        "max_task_retries": 0,
        "max_concurrency": 4,  # one follows, one sends signals
    }
