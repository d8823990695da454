"""HTTP to instances, with aiohttp. Knows nothing of OpenAI: bytes out, bytes in, failures by kind."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping

import aiohttp

from vllm_fleet.core import limits
from vllm_fleet.core.errors import PeerGone
from vllm_fleet.router.handoff import FailureKind

# uvicorn, which vLLM runs on, closes idle connections after 5 s: shorter here, so that no request meets the closing.
_KEEPALIVE_S = 3.0


class UpstreamFailure(PeerGone):
    """An instance did not answer, or not to the end."""

    def __init__(self, kind: FailureKind, reason: str) -> None:
        super().__init__(f"{kind}: {reason}")
        self.kind: FailureKind = kind
        self.reason = reason


class UpstreamAnswer:
    """An answer whose headers are here. Its body is read once, by ``chunks`` or by ``read``."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.headers: list[tuple[str, str]] = list(response.headers.items())

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes; no more is taken from the instance than the reader takes.

        Raises:
            UpstreamFailure: the connection ended before the body did.
        """
        try:
            async for chunk in self._response.content.iter_any():
                yield chunk
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamFailure("disconnected", _sentence(error)) from error

    async def read(self, bytes_max: int) -> bytes:
        """The whole body.

        Raises:
            UpstreamFailure: the connection ended before the body did, or the body is over ``bytes_max``.
        """
        body = bytearray()
        async for chunk in self.chunks():
            body += chunk
            if len(body) > bytes_max:
                raise UpstreamFailure("too_large", f"an answer of over {bytes_max} bytes")
        return bytes(body)


class Upstream:
    """Connections to all instances; use as ``async with``. No redirects, no proxies, no cookies, no decompression."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Upstream:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=limits.CONNECT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent"),
            max_field_size=limits.HEADER_BYTES_MAX,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    def post(
        self, url: str, headers: Mapping[str, str], body: bytes
    ) -> contextlib.AbstractAsyncContextManager[UpstreamAnswer]:
        """Send ``body``; leaving the block closes the connection at once if the answer was not read to its end.

        Raises:
            UpstreamFailure: no answer came.
        """
        return self._send("POST", url, headers, body)

    def get(self, url: str, headers: Mapping[str, str]) -> contextlib.AbstractAsyncContextManager[UpstreamAnswer]:
        """Like ``post``, without a body."""
        return self._send("GET", url, headers, None)

    @contextlib.asynccontextmanager
    async def _send(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None
    ) -> AsyncIterator[UpstreamAnswer]:
        assert self._session is not None, "Upstream is used as `async with`"
        try:
            response = await self._session.request(method, url, headers=headers, data=body, allow_redirects=False)
        except (aiohttp.ClientConnectorError, aiohttp.ServerTimeoutError) as error:
            raise UpstreamFailure("refused", _sentence(error)) from error
        except (aiohttp.ClientConnectionError, OSError) as error:
            raise UpstreamFailure("disconnected", _sentence(error)) from error
        except aiohttp.ClientError as error:
            raise UpstreamFailure("bad_answer", _sentence(error)) from error
        try:
            yield UpstreamAnswer(response)
        finally:
            response.close()


def _sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]
