"""What every request meets at the door, and who hears of its end: API keys, cache salts, traces, log, metrics."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from msgspec import Raw

from vllm_fleet.config.front_settings import FrontSettings
from vllm_fleet.config.keys import SETTING as KEYS_SETTING
from vllm_fleet.config.keys import read_keys
from vllm_fleet.core import limits, log
from vllm_fleet.core.env import Env
from vllm_fleet.core.errors import BadRequest
from vllm_fleet.net import tls
from vllm_fleet.router.observer import Observer, observer
from vllm_fleet.router.problem import Problem
from vllm_fleet.router.refresh import Refresh, Refresher
from vllm_fleet.router.tenants import NO_KEY, SALT, Salts, Tenants, own_salt

_KEYS_IN = frozenset({"authorization", "x-api-key"})


def _no_files() -> Refresher:
    return Refresher(())


@dataclass(slots=True)
class Front:
    """Belongs to one event loop. As it comes: no keys, no salts, nobody told but the metrics."""

    observer: Observer
    tenants: Tenants = field(default_factory=lambda: Tenants(None))
    salts: Salts | None = None
    tls: ssl.SSLContext | None = None
    refresher: Refresher = field(default_factory=_no_files)
    warn_at: float = 0.0

    def inner_headers(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """Those that may go further in: a key that was for us does not."""
        if not self.tenants.wanted:
            return headers
        return {name: value for name, value in headers.items() if name not in _KEYS_IN}

    def turned_away(self, peer: str, now: float) -> None:
        """Somebody had no good key: say so, now and then."""
        if now >= self.warn_at:
            self.warn_at = now + limits.WARN_EVERY_S
            log.warn("auth.refused", peer=peer, status=NO_KEY.status)

    def salt(self, fields: dict[str, Raw], tenant: str) -> Problem | None:
        """Set the cache salt of a request, or say why it cannot be."""
        try:
            if self.salts is not None:
                self.salts.set(fields, tenant)
            else:
                own_salt(fields)
        except BadRequest as error:
            return Problem(400, "invalid_cache_salt", f"{error}.", param=SALT)
        return None

    def close(self) -> None:
        """Write and send what waits; blocks for a few seconds at most."""
        self.observer.close()


def make_front(settings: FrontSettings, fleet: str, token: bytes, env: Env) -> Front:
    """The front that the settings ask for.

    Raises:
        ConfigError: a file cannot be used, or something is not installed.
    """
    tenants, refreshes = Tenants(None), []
    if settings.keys_file is not None:
        refreshes.append(Refresh(KEYS_SETTING, (settings.keys_file,), _keys(settings.keys_file, tenants)))
    context = None
    if settings.cert_file is not None and settings.key_file is not None:
        files = (settings.cert_file, settings.key_file)
        context = tls.server_context(*files)
        refreshes.append(Refresh(tls.SETTING, files, _certificate(*files, context)))
    refresher = Refresher(refreshes)
    salts = Salts(token) if tenants.wanted and settings.tenant_salt == "auto" else None
    told = observer(fleet, env, settings.access_log, settings.trace_endpoint, settings.trace_share)
    return Front(told, tenants, salts, context, refresher)


def _keys(file: str, tenants: Tenants) -> Callable[[], Callable[[], None]]:
    def read() -> Callable[[], None]:
        keys = read_keys(file)
        return lambda: tenants.replace(keys)

    return read


def _certificate(cert_file: str, key_file: str, context: ssl.SSLContext) -> Callable[[], Callable[[], None]]:
    def read() -> Callable[[], None]:
        tls.server_context(cert_file, key_file)  # whether they fit
        return lambda: tls.load(context, cert_file, key_file)

    return read
