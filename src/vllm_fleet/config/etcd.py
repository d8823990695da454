"""Settings of the etcd that controllers share. Secrets stay in files that only their owner reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from msgspec import Meta, Struct

from vllm_fleet.core import limits
from vllm_fleet.core.errors import ConfigError
from vllm_fleet.wire.names import Url


class EtcdSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """Where the journal is kept when several controllers may run. Secrets stay in files that only their owner reads."""

    endpoints: Annotated[tuple[Url, ...], Meta(min_length=1, max_length=limits.ETCD_ENDPOINTS_MAX)]
    prefix: Annotated[str, Meta(min_length=1, max_length=limits.URL_LEN_MAX)] = "/vllm-fleet"
    credentials_file: str | None = None
    """One line ``USER:PASSWORD``."""
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    lease_s: Annotated[int, Meta(ge=2, le=60)] = 3
    """A leader that cannot renew it for so long is replaced."""


def check_etcd(settings: EtcdSettings, key: str = "etcd") -> None:
    """ConfigError when settings do not fit together, or a file of them cannot be used. ``key``: what they hang on."""
    for endpoint in settings.endpoints:
        parts = urlsplit(endpoint)
        if "@" in parts.netloc:
            raise ConfigError(f"{key}.endpoints: put user and password into {key}.credentials_file, not into the URL")
        if parts.scheme != urlsplit(settings.endpoints[0]).scheme:
            raise ConfigError(f"{key}.endpoints: all must begin with http, or all with https")
        if parts.scheme == "http" and (settings.ca_file or settings.cert_file):
            raise ConfigError(
                f"{key}.endpoints: {endpoint} has no TLS; with ca_file or cert_file it must begin with https"
            )
    if (settings.cert_file is None) != (settings.key_file is None):
        raise ConfigError(f"{key}.cert_file and {key}.key_file: give both or neither")
    for name in ("ca_file", "cert_file", "key_file"):
        file = getattr(settings, name)
        if file is not None and not Path(file).is_file():
            raise ConfigError(f"{key}.{name}: there is no file {file}")
    read_credentials(settings, key)


def read_credentials(settings: EtcdSettings, key: str = "etcd") -> tuple[str, str] | None:
    """User and password; None where etcd asks for none.

    Raises:
        ConfigError: the file is missing, not of one line ``USER:PASSWORD``, or open to other users.
    """
    if settings.credentials_file is None:
        return None
    file = Path(settings.credentials_file)
    try:
        mode = file.stat().st_mode & 0o777
        user, separator, password = file.read_text().strip().partition(":")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{key}.credentials_file: cannot read {file}: {reason}") from error
    if mode & 0o077:
        raise ConfigError(
            f"{key}.credentials_file: {file} has mode {mode:03o}, others could read it; run: chmod 600 {file}"
        )
    if not user or not separator or "\n" in password:
        raise ConfigError(f"{key}.credentials_file: {file} must hold one line USER:PASSWORD")
    return user, password
