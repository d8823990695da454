"""A few calls of etcd's v3 API, each with a deadline, at whichever of several endpoints answers.

Speaks through etcd3gw to the JSON gateway that every etcd serves (decisions/0002). Every request made here may be sent
twice without harm, so one whose answer was lost is sent to the next endpoint: callers recognise what arrived before.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from vllm_fleet.config.etcd import EtcdSettings, read_credentials
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import Busy, ConfigError, Corrupt, FleetError

if TYPE_CHECKING:
    import etcd3gw.exceptions
    from etcd3gw.client import Etcd3Client

NOT_FOUND, UNAUTHENTICATED = 5, 16  # gRPC status codes
PAGE_KEYS = 128
Op = dict[str, Any]  # one part of a transaction, as the gateway takes it

Shape = TypeVar("Shape", bound=Struct)


class EtcdFailed(Busy):
    """No endpoint did what it was asked; the message says why. ``code``: gRPC's, when etcd itself refused."""

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Pair:
    """A key with its value, and the revisions etcd gave them."""

    key: bytes
    value: bytes
    created: int
    modified: int
    lease: int


class _Kv(Struct, frozen=True):
    key: str
    value: str = ""
    create_revision: int = 0
    mod_revision: int = 0
    lease: int = 0

    def pair(self) -> Pair:
        key, value = base64.b64decode(self.key), base64.b64decode(self.value)
        return Pair(key, value, self.create_revision, self.mod_revision, self.lease)


class _Range(Struct, frozen=True):
    kvs: tuple[_Kv, ...] = ()
    more: bool = False


class _Response(Struct, frozen=True):
    response_range: _Range | None = None


class _Txn(Struct, frozen=True):
    succeeded: bool = False
    responses: tuple[_Response, ...] = ()


class _Granted(Struct, frozen=True):
    ID: int
    TTL: int


class _Kept(Struct, frozen=True):
    TTL: int = 0


class _KeptAlive(Struct, frozen=True):
    result: _Kept


class _Token(Struct, frozen=True):
    token: str


def created(key: bytes, revision: int) -> Op:
    """Condition: ``key`` was created at ``revision``; 0: it does not exist."""
    return {"key": _text(key), "target": "CREATE", "result": "EQUAL", "create_revision": str(revision)}


def modified(key: bytes, revision: int) -> Op:
    """Condition: ``key`` was last written at ``revision``; 0: it does not exist."""
    return {"key": _text(key), "target": "MOD", "result": "EQUAL", "mod_revision": str(revision)}


def put(key: bytes, value: bytes, lease: int = 0) -> Op:
    return {"request_put": {"key": _text(key), "value": _text(value), "lease": str(lease)}}


def read(key: bytes) -> Op:
    return {"request_range": {"key": _text(key)}}


def delete(first: bytes, end: bytes) -> Op:
    """Delete the keys from ``first`` to before ``end``."""
    return {"request_delete_range": {"key": _text(first), "range_end": _text(end)}}


class EtcdClient:
    """Calls block and may come from any thread, one at a time. All raise EtcdFailed, or Corrupt for an answer that is
    none. A server that sends single bytes without end is not cut off: etcd is trusted, as the disk is.
    """

    def __init__(self, settings: EtcdSettings) -> None:
        """Connects to nobody yet. ConfigError: etcd3gw is not installed, or a file cannot be read."""
        try:
            from etcd3gw.client import Etcd3Client
        except ImportError as error:
            raise ConfigError(
                "controller.store: etcd needs the package etcd3gw; run: pip install 'vllm-fleet[etcd]'"
            ) from error
        self._credentials = read_credentials(settings)
        self._endpoints: dict[str, Etcd3Client] = {}
        for endpoint in settings.endpoints:
            parts = urlsplit(endpoint)
            assert parts.hostname is not None, "checked by settings"
            client = Etcd3Client(
                parts.hostname, parts.port or 2379, parts.scheme, settings.ca_file, settings.key_file,
                settings.cert_file, api_path="/v3/",
            )  # fmt: skip
            client.session.trust_env = False  # neither a proxy nor .netrc of the environment
            client.session.max_redirects = 0
            self._endpoints[endpoint] = client
        self._first = 0

    def txn(
        self, compare: Sequence[Op], success: Sequence[Op], failure: Sequence[Op], deadline: Deadline
    ) -> tuple[bool, tuple[Pair | None, ...]]:
        """Whether all of ``compare`` held; what the reads of the branch taken found."""
        body = {"compare": list(compare), "success": list(success), "failure": list(failure)}
        answer = self._post("/kv/txn", body, _Txn, deadline)
        ranges = [response.response_range for response in answer.responses if response.response_range is not None]
        return answer.succeeded, tuple(found.kvs[0].pair() if found.kvs else None for found in ranges)

    def get(self, key: bytes, deadline: Deadline) -> Pair | None:
        found = self._post("/kv/range", {"key": _text(key)}, _Range, deadline)
        return found.kvs[0].pair() if found.kvs else None

    def pages(self, first: bytes, end: bytes, deadline_s: float, setting: str) -> Iterator[list[Pair]]:
        """The pairs from ``first`` to before ``end`` in order, a page at a time; each page has ``deadline_s``."""
        while True:
            body = {"key": _text(first), "range_end": _text(end), "limit": str(PAGE_KEYS)}
            found = self._post("/kv/range", body, _Range, Deadline.after(deadline_s, setting))
            page = [kv.pair() for kv in found.kvs]
            yield page
            if not found.more or not page:
                return
            first = page[-1].key + b"\0"

    def grant(self, ttl_s: int, deadline: Deadline) -> tuple[int, int]:
        """A new lease: its id, and for how long it was given."""
        answer = self._post("/lease/grant", {"TTL": str(ttl_s)}, _Granted, deadline)
        return answer.ID, answer.TTL

    def keep_alive(self, lease: int, deadline: Deadline) -> int:
        """Seconds that the lease lives on; 0 when it has ended."""
        return self._post("/lease/keepalive", {"ID": str(lease)}, _KeptAlive, deadline).result.TTL

    def revoke(self, lease: int, deadline: Deadline) -> None:
        """End a lease, and delete its keys; nothing when it has ended."""
        try:
            self._post("/lease/revoke", {"ID": str(lease)}, Struct, deadline)
        except EtcdFailed as error:
            if error.code != NOT_FOUND:
                raise

    def wait_change(self, key: bytes, revision: int, deadline: Deadline) -> None:
        """Return when ``key`` changes after ``revision``, at the latest at ``deadline``; sooner when etcd is lost."""
        import requests

        client = list(self._endpoints.values())[self._first]
        watch = {"create_request": {"key": _text(key), "start_revision": str(revision + 1)}}
        try:
            while not deadline.expired():
                left = deadline.remaining() or 1e-3
                with client.session.post(client.get_url("/watch"), json=watch, stream=True, timeout=left) as answer:
                    if answer.status_code != 200:
                        return
                    for line in answer.iter_lines():
                        if deadline.expired() or b'"events"' in line or b'"canceled"' in line:
                            return
        except requests.RequestException:
            return  # who waits asks again, and is told then what is wrong

    def close(self) -> None:
        for client in self._endpoints.values():
            client.session.close()

    def _post(self, path: str, body: Op, shape: type[Shape], deadline: Deadline) -> Shape:
        names = list(self._endpoints)
        failed: FleetError | None = None
        for turn in range(len(names)):
            at = (self._first + turn) % len(names)
            share = deadline.capped(deadline.remaining() / (len(names) - turn))
            try:
                answer = self._ask(names[at], path, body, share)
                decoded = msgspec.convert(answer, shape, strict=False)
            except EtcdFailed as error:
                failed = error
                if error.code in (NOT_FOUND, UNAUTHENTICATED):
                    break  # another endpoint says the same
            except msgspec.ValidationError as error:
                raise Corrupt(f"etcd at {names[at]}: the answer is not what it must be: {error}") from error
            else:
                self._first = at
                return decoded
        assert failed is not None
        raise failed

    def _ask(self, endpoint: str, path: str, body: Op, deadline: Deadline) -> object:
        client = self._endpoints[endpoint]
        if self._credentials is not None and "Authorization" not in client.session.headers:
            self._authenticate(endpoint, deadline)
        try:
            return self._send(endpoint, path, body, deadline)
        except EtcdFailed as error:
            if error.code != UNAUTHENTICATED or self._credentials is None:
                raise
        self._authenticate(endpoint, deadline)  # etcd's tokens end after a while
        return self._send(endpoint, path, body, deadline)

    def _authenticate(self, endpoint: str, deadline: Deadline) -> None:
        assert self._credentials is not None
        session = self._endpoints[endpoint].session
        session.headers.pop("Authorization", None)
        user, password = self._credentials
        answer = self._send(endpoint, "/auth/authenticate", {"name": user, "password": password}, deadline)
        session.headers["Authorization"] = msgspec.convert(answer, _Token).token

    def _send(self, endpoint: str, path: str, body: Op, deadline: Deadline) -> object:
        import etcd3gw.exceptions
        import requests

        client = self._endpoints[endpoint]
        if deadline.expired():
            raise EtcdFailed(f"etcd at {endpoint}: no time is left ({deadline.setting})")
        client.timeout = deadline.remaining() or 1e-3
        try:
            answer: object = client.post(client.get_url(path), json=body)
        except etcd3gw.exceptions.ConnectionTimeoutError as error:
            raise EtcdFailed(f"etcd at {endpoint} did not answer {path} in time ({deadline.setting})") from error
        except etcd3gw.exceptions.Etcd3Exception as error:
            raise _refusal(endpoint, error) from error
        except requests.RequestException as error:
            raise EtcdFailed(f"etcd at {endpoint}: {_root(error)}") from error
        return answer


def _refusal(endpoint: str, error: etcd3gw.exceptions.Etcd3Exception) -> EtcdFailed:
    try:
        said = json.loads(error.detail_text or "")
        return EtcdFailed(f"etcd at {endpoint}: {said['message']}", int(said["code"]))
    except (ValueError, TypeError, KeyError):
        return EtcdFailed(f"etcd at {endpoint}: {_root(error)}")


def _root(error: BaseException) -> str:
    """What the system said at the bottom of a chain of exceptions; never what was sent."""
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, OSError) and at.strerror:
            return at.strerror
        inside = next((each for each in at.args if isinstance(each, BaseException)), None)
        at = at.__cause__ or at.__context__ or inside
    return f"failed ({type(error).__name__})"


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")
