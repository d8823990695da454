"""HTTP to instances. Knows nothing of OpenAI: bytes out, bytes in, failures by kind."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from types import TracebackType

from vllm_fleet.core import limits
from vllm_fleet.core.errors import BadRequest, PeerGone
from vllm_fleet.net.http.client import Asked, Pool
from vllm_fleet.net.http.messages import BrokenOff, NotHttp, Unreachable
from vllm_fleet.router.steps import FailureKind


class UpstreamFailure(PeerGone):
    """An instance did not answer, or not to the end.

    ``stale``: it closed a kept connection as the request was sent, and nothing of an answer came: most likely it never
    saw the request.
    """

    def __init__(self, kind: FailureKind, reason: str, *, stale: bool = False) -> None:
        super().__init__(f"{kind}: {reason}")
        self.stale = stale
        self.kind: FailureKind = kind
        self.reason = reason


class UpstreamAnswer:
    """An answer whose headers are here. Its body is read once, by ``chunks`` or by ``read``.

    ``headers`` may be shared with other answers: it is not to be changed.
    """

    __slots__ = ("_asked", "headers", "status")

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self.status = asked.status
        self.headers: list[tuple[str, str]] = asked.headers

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes; no more is taken from the instance than the reader takes.

        Raises:
            UpstreamFailure: the connection ended before the body did.
        """
        try:
            async for chunk in self._asked.chunks():
                yield chunk
        except (BrokenOff, NotHttp) as error:
            raise UpstreamFailure("disconnected", _sentence(error)) from error

    async def read(self, bytes_max: int) -> bytes:
        """The whole body.

        Raises:
            UpstreamFailure: the connection ended before the body did, or the body is over ``bytes_max``.
        """
        try:
            body = await self._asked.read(bytes_max)
        except (BrokenOff, NotHttp) as error:
            raise UpstreamFailure("disconnected", _sentence(error)) from error
        if body is None:
            raise UpstreamFailure("too_large", f"an answer of over {bytes_max} bytes")
        return body


class Upstream:
    """Connections to all instances; use as ``async with``."""

    def __init__(self) -> None:
        self._pool: Pool | None = None

    async def __aenter__(self) -> Upstream:
        self._pool = Pool(connect_s=limits.CONNECT_S, idle_s=limits.POOL_IDLE_S)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._pool is not None:
            await self._pool.close()

    def post(self, url: str, headers: Mapping[str, str], body: bytes) -> Sent:
        """Send ``body``; leaving the block closes the connection at once if the answer was not read to its end.

        Raises:
            UpstreamFailure: no answer came.
        """
        return Sent(self._ready(), "POST", url, headers, body)

    def get(self, url: str, headers: Mapping[str, str]) -> Sent:
        """Like ``post``, without a body."""
        return Sent(self._ready(), "GET", url, headers, None)

    def _ready(self) -> Pool:
        assert self._pool is not None, "Upstream is used as `async with`"
        return self._pool


class Sent:
    """One request to an instance, as an ``async with`` that gives its answer."""

    __slots__ = ("_asked", "_pool", "_what")

    def __init__(self, pool: Pool, method: str, url: str, headers: Mapping[str, str], body: bytes | None) -> None:
        self._pool, self._what = pool, (method, url, headers, body)
        self._asked: Asked | None = None

    async def __aenter__(self) -> UpstreamAnswer:
        try:
            self._asked = await self._pool.ask(*self._what).__aenter__()
        except BrokenOff as error:
            raise UpstreamFailure("disconnected", _sentence(error), stale=error.stale) from error
        except Unreachable as error:
            raise UpstreamFailure("refused", _sentence(error)) from error
        except (NotHttp, BadRequest) as error:
            raise UpstreamFailure("bad_answer", _sentence(error)) from error
        return UpstreamAnswer(self._asked)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._asked is not None:
            await self._asked.__aexit__(kind, error, trace)


def _sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]
