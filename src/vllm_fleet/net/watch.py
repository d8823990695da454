"""Follow the fleet: a watch stream that is opened again whenever it breaks, and goes on where it was."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, Callable, Sequence

import aiohttp

from vllm_fleet.core import limits, log
from vllm_fleet.core.errors import Corrupt, NotLeader, PeerGone
from vllm_fleet.net.candidates import Candidates
from vllm_fleet.wire.control import News, Snapshot, StillHere, WatchEvent, decode_error, decode_watch_event

OnEvent = Callable[[News], None]


async def watch(urls: str | Sequence[str], bearer: str, on_event: OnEvent) -> None:
    """Call ``on_event`` with a Snapshot, then each Change in order; with a Snapshot again where changes were missed.

    Of several controllers the one that leads is watched. Ends only by cancellation (or by what ``on_event`` raises): an
    outage is logged once and they are tried again, with pauses of WATCH_BACKOFF_S_MAX at most.
    """
    follower = Follower(on_event)
    candidates = Candidates(urls)
    rng = random.Random()
    failures = 0
    timeout = aiohttp.ClientTimeout(
        total=None, sock_connect=limits.WATCH_CONNECT_S, sock_read=limits.WATCH_SILENCE_S, connect=None
    )
    headers = {"Authorization": f"Bearer {bearer}"}
    async with aiohttp.ClientSession(timeout=timeout, headers=headers) as session:
        while True:
            url = candidates.order()[0]
            try:
                async with contextlib.aclosing(_stream(session, url, follower.resume())) as events:
                    async for event in events:
                        if failures:
                            log.event("controller.reachable", url=url)
                        failures = 0
                        follower.take(event)
                pause_s = limits.WATCH_BACKOFF_S_MIN  # it ended in order: the controller stops, or cut us off
            except (PeerGone, NotLeader) as error:
                candidates.passed(url, error.leader if isinstance(error, NotLeader) else "")
                if failures == 0:
                    log.warn("controller.unreachable", url=url, reason=str(error))
                rounds = failures // len(candidates)
                pause_s = min(limits.WATCH_BACKOFF_S_MAX, limits.WATCH_BACKOFF_S_MIN * 2 ** min(rounds, 16))
                failures += 1
            except Corrupt as error:
                if failures == 0:
                    log.warn("frame.refused", peer=url, reason=str(error))
                follower.forget()
                candidates.passed(url)
                pause_s = limits.WATCH_BACKOFF_S_MAX
                failures += 1
            await asyncio.sleep(pause_s * rng.uniform(0.5, 1.0))


class Follower:
    """Where the stream stands: of which journal, and after which revision."""

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event
        self._controller = ""
        self._revision = -1

    def resume(self) -> dict[str, str]:
        if self._revision < 0:
            return {}
        return {"since": str(self._revision), "controller": self._controller}

    def forget(self) -> None:
        """Start from a snapshot next time."""
        self._revision = -1

    def take(self, event: WatchEvent) -> None:
        if isinstance(event, Snapshot):
            self._controller, self._revision = event.controller, event.revision
        elif isinstance(event, StillHere):
            return
        elif self._revision < 0:
            raise Corrupt("a change came before the first snapshot")
        elif event.revision <= self._revision:
            return
        else:
            self._revision = event.revision
        self._on_event(event)


async def _stream(session: aiohttp.ClientSession, url: str, resume: dict[str, str]) -> AsyncGenerator[WatchEvent, None]:
    """The events of one connection. Raises PeerGone, NotLeader or Corrupt; ends when the controller ends the stream."""
    try:
        async with session.get(f"{url}/v1/watch", params=resume, allow_redirects=False) as response:
            if response.status == 503:
                raise _busy(await response.content.read(limits.URL_LEN_MAX * 4))
            if response.status != 200:
                raise PeerGone(f"the controller refused to be watched: status {response.status}")
            pending = bytearray()
            lines = 0
            async for received in response.content.iter_any():
                searched = len(pending)
                pending += received
                while (end := pending.find(b"\n", searched)) >= 0:
                    yield _decoded(bytes(pending[:end]))
                    del pending[: end + 1]
                    searched, lines = 0, lines + 1
                if len(pending) > limits.WATCH_LINE_BYTES_MAX:
                    raise Corrupt(f"a line is longer than {limits.WATCH_LINE_BYTES_MAX} bytes")
            if lines == 0:
                raise PeerGone("the controller ended the stream without a word")
    except TimeoutError as error:  # includes aiohttp's own time-outs
        raise PeerGone(f"nothing came for {limits.WATCH_SILENCE_S} s (limits.WATCH_SILENCE_S)") from error
    except (aiohttp.ClientError, OSError) as error:
        raise PeerGone(str(error) or type(error).__name__) from error


def _busy(answer: bytes) -> PeerGone | NotLeader:
    try:
        body = decode_error(answer)
    except (ValueError, RecursionError):
        return PeerGone("the controller refused to be watched: status 503")
    if body.code == "not_leader":
        return NotLeader(body.error, body.leader)
    return PeerGone(f"the controller refused to be watched: {body.error}")


def _decoded(line: bytes) -> WatchEvent:
    try:
        event: WatchEvent = decode_watch_event(line)
        return event
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"a line of {len(line)} bytes is no watch event") from error
