"""Follows the KV events of instances over ZeroMQ, each from its own unix sockets; the one impure module here.

What was missed (a slow start, a full queue) is asked for once; where that cannot be had, the instance's blocks are
forgotten and learnt anew: a prefix that is not known costs a hit, one that is wrongly believed costs a queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import zmq
import zmq.asyncio

from vllm_fleet.core import limits, log
from vllm_fleet.core.errors import Corrupt
from vllm_fleet.core.ids import InstanceName
from vllm_fleet.router.prefix.book import PrefixBook
from vllm_fleet.router.prefix.events import END, SEQUENCE_BYTES, Event, Sequence, parse, parse_sequence
from vllm_fleet.wire.control import Member

PUBLISH, REPLAY = "kv-events", "kv-replay"
_LOOK_S = 1.0  # between two looks at who is there
_RETRY_S = 1.0  # before an instance whose events made no sense is asked anew


Members = Callable[[], Iterable[Member]]
"""Who is there now and publishes events."""


def endpoints(folder: str, name: str) -> tuple[str, str]:
    """Where an instance publishes its events, and where it can be asked for old ones."""
    base = folder.replace("{name}", name)
    return f"ipc://{base}/{PUBLISH}", f"ipc://{base}/{REPLAY}"


async def run_subscriptions(book: PrefixBook, members: Members, folder: str) -> None:
    """Follow the events of whoever is there, until cancelled. ``folder``: with ``{name}`` in place of the name."""
    context = zmq.asyncio.Context()
    running: dict[tuple[str, str], asyncio.Task[None]] = {}
    try:
        async with asyncio.TaskGroup() as group:
            while True:
                wanted = {(one.name, one.incarnation) for one in members()}
                for key in running.keys() - wanted:
                    running.pop(key).cancel()
                    book.follow(InstanceName(key[0]), live=False)
                for name, incarnation in wanted - running.keys():
                    publish, replay = endpoints(folder, name)
                    work = _follow(book, InstanceName(name), context, publish, replay)
                    running[name, incarnation] = group.create_task(work, name=f"kv events {name}")
                await asyncio.sleep(_LOOK_S)
    finally:
        context.destroy(linger=0)


async def _follow(
    book: PrefixBook, name: InstanceName, context: zmq.asyncio.Context, publish: str, replay: str
) -> None:
    while True:
        try:
            await _Follower(book, name, context, publish, replay).run()
        except (Corrupt, zmq.ZMQError) as error:
            book.follow(name, live=False)
            log.warn("kv_events.failed", instance=name, reason=str(error))
        await asyncio.sleep(_RETRY_S)


class _Follower:
    """One life of one instance."""

    def __init__(
        self, book: PrefixBook, name: InstanceName, context: zmq.asyncio.Context, publish: str, replay: str
    ) -> None:
        self._book, self._name, self._context = book, name, context
        self._publish, self._replay = publish, replay
        self._sequence = Sequence()

    async def run(self) -> None:
        """Take events for ever.

        Raises:
            Corrupt: what came is no stream of events.
        """
        with self._context.socket(zmq.SUB) as socket:
            _limit(socket)
            socket.connect(self._publish)
            socket.subscribe(b"")
            self._book.follow(self._name, live=True)
            await self._catch_up()
            while True:
                # Nothing to wait for but the next event: silence is what an idle instance says.
                await socket.poll()
                for _ in range(limits.KV_EVENT_BATCH):
                    try:
                        frames = await socket.recv_multipart(zmq.NOBLOCK)
                    except zmq.Again:
                        break
                    await self._take(frames)
                await asyncio.sleep(0)

    async def _take(self, frames: list[bytes]) -> None:
        if len(frames) != 3:
            raise Corrupt(f"a message of {len(frames)} frames, expected 3")
        number, payload = parse_sequence(frames[1]), frames[2]
        verdict = self._sequence.judge(number)
        if verdict == "gap":
            await self._catch_up()
            verdict = self._sequence.judge(number)
        if verdict == "old":
            return
        self._apply(number, parse(payload), lost=verdict == "gap")

    def _apply(self, number: int, events: list[Event], *, lost: bool) -> None:
        if lost:
            log.event("kv_events.gap", instance=self._name, expected=self._sequence.expected, found=number)
            self._book.follow(self._name, live=True)
        self._book.take(self._name, events)
        self._sequence.took(number)

    async def _catch_up(self) -> None:
        """Ask for what was missed. An instance that does not answer has nothing to tell, or cannot: go on without."""
        with self._context.socket(zmq.DEALER) as socket:
            _limit(socket)
            socket.connect(self._replay)
            try:
                async with asyncio.timeout(limits.KV_EVENT_REPLAY_S):
                    await socket.send_multipart([b"", self._sequence.expected.to_bytes(SEQUENCE_BYTES, "big")])
                    for _ in range(limits.KV_EVENT_REPLAY_MESSAGES_MAX):
                        frames = await socket.recv_multipart()
                        if len(frames) != 4:
                            raise Corrupt(f"a replayed message of {len(frames)} frames, expected 4")
                        if frames[2] == END:
                            return
                        number = parse_sequence(frames[2])
                        verdict = self._sequence.judge(number)
                        if verdict != "old":
                            self._apply(number, parse(frames[3]), lost=verdict == "gap")
            except TimeoutError:
                return


def _limit(socket: zmq.asyncio.Socket) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, limits.KV_EVENT_BYTES_MAX)
    socket.setsockopt(zmq.RCVHWM, limits.KV_EVENT_QUEUE_MAX)
