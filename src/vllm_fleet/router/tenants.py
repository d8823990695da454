"""Who asks: API keys to tenants, and the cache salt that keeps tenants' prefixes apart. Pure.

A tenant is the name of an API key. Without a keys file nobody is asked for one, and everybody is the tenant "".
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Mapping

import msgspec
from msgspec import Raw

from vllm_fleet.config.keys import digest
from vllm_fleet.core import limits
from vllm_fleet.core.errors import BadRequest
from vllm_fleet.router.problem import Problem

ANYBODY = ""
SALT = "cache_salt"
_SALT_LEN_MAX = 128  # of vLLM 0.32, entrypoints/generate/base/protocol.py, validate_cache_salt; and what it forbids
_SALT_FORBIDDEN = frozenset("@/\\\0")

_decode_text = msgspec.json.Decoder(str).decode
_encode = msgspec.json.Encoder().encode


class Tenants:
    """The keys that are good now."""

    def __init__(self, keys: Mapping[str, bytes] | None) -> None:
        """``keys``: name -> digest, from ``config.keys.read_keys``; None: nobody needs one."""
        self._known: dict[bytes, tuple[bytes, str]] | None = None
        if keys is not None:
            self.replace(keys)

    @property
    def wanted(self) -> bool:
        """Whether a key is needed."""
        return self._known is not None

    def replace(self, keys: Mapping[str, bytes]) -> None:
        """These are good from now on, and no others."""
        self._known = {kept: (kept, name) for name, kept in keys.items()}

    def of(self, headers: Mapping[str, str]) -> str | None:
        """The tenant whose key a request's headers (names in lower case) hold; None: no good key.

        How long it takes tells nothing of keys: what is looked up is the hash of what came, so an attacker who learnt
        where a comparison ends would still know no key that comes nearer.
        """
        if self._known is None:
            return ANYBODY
        given = headers.get("authorization")
        if given is not None:
            scheme, _, key = given.partition(" ")
            if scheme.lower() != "bearer":
                return None
        else:
            key = headers.get("x-api-key", "")  # Anthropic's clients
        hashed = digest(key.strip().encode("utf-8", "surrogateescape"))
        kept, name = self._known.get(hashed, _NOBODY)
        return name if hmac.compare_digest(kept, hashed) else None


_NOBODY = (bytes(32), ANYBODY)
NO_KEY = Problem(
    401,
    "invalid_api_key",
    "An API key of this fleet is needed: send the header Authorization: Bearer and the key.",
    headers={"WWW-Authenticate": "Bearer"},
)
"""The same for no key, a wrong one and a revoked one."""


class Salts:
    """The cache salts that instances are given: of two tenants never the same, whatever they send themselves."""

    def __init__(self, token: bytes) -> None:
        """``token``: the fleet's; a tenant that does not know it cannot find another's salt."""
        self._key = hmac.new(token, b"vllm-fleet/cache-salt", hashlib.sha256).digest()
        self._own: dict[str, Raw] = {}

    def set(self, fields: dict[str, Raw], tenant: str) -> None:
        """Put the tenant's salt into a request's top-level fields.

        Raises:
            BadRequest: the client's own salt is none.
        """
        given = own_salt(fields)
        if given is not None:
            fields[SALT] = self._made(tenant, given)
            return
        salt = self._own.get(tenant)
        if salt is None:
            if len(self._own) >= limits.KEYS_MAX:  # names that were revoked long ago
                self._own.clear()
            salt = self._own[tenant] = self._made(tenant, None)
        fields[SALT] = salt

    def _made(self, tenant: str, given: str | None) -> Raw:
        # Names hold no NUL, so the two parts cannot be shifted against each other.
        text = tenant.encode() if given is None else tenant.encode() + b"\0" + given.encode("utf-8", "surrogatepass")
        made = hmac.new(self._key, text, hashlib.sha256).digest()
        return Raw(_encode(base64.urlsafe_b64encode(made).decode().rstrip("=")))


def own_salt(fields: Mapping[str, Raw]) -> str | None:
    """The client's cache salt; None: it sent none.

    Raises:
        BadRequest: it is nothing that vLLM takes. Some of what it once took killed its engine (CVE-2026-105756).
    """
    raw = fields.get(SALT)
    if raw is None or bytes(raw) == b"null":
        return None
    try:
        given = _decode_text(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        given = ""
    if not 0 < len(given) <= _SALT_LEN_MAX or not _SALT_FORBIDDEN.isdisjoint(given):
        raise BadRequest(f"{SALT}: must be a string of 1 to {_SALT_LEN_MAX} characters without '@', '/', '\\' and NUL")
    return given
