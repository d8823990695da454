"""TLS for what listens: a certificate and its key, from files that may be replaced while we serve."""

from __future__ import annotations

import ssl
from pathlib import Path

from vllm_fleet.core.errors import ConfigError

SETTING = "router.tls"


def server_context(cert_file: str, key_file: str, setting: str = SETTING) -> ssl.SSLContext:
    """A context that speaks TLS 1.2 and 1.3, HTTP/1.1 inside.

    Raises:
        ConfigError: see ``load``.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    # Each resumption ticket is a write of its own after the handshake, and a secret that outlives the certificate.
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    load(context, cert_file, key_file, setting)
    return context


def load(context: ssl.SSLContext, cert_file: str, key_file: str, setting: str = SETTING) -> None:
    """Use these files for connections from now on; those that are open stay as they are.

    Raises:
        ConfigError: a file is missing, the key is open to other users or wants a password, or they are no pair.
    """
    check_files(cert_file, key_file, setting)
    try:
        # A context of its own first: a pair that does not fit must not leave half of it in the one that serves.
        for each in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), context):
            each.load_cert_chain(cert_file, key_file, password=_no_password)
    except _PasswordWanted:
        raise ConfigError(f"{setting}.key_file: {key_file} wants a password; give a key without one") from None
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"{setting}: {cert_file} and {key_file} are no certificate and its key in PEM: {error}"
        ) from error


def check_files(cert_file: str, key_file: str, setting: str = SETTING) -> None:
    """ConfigError when a file cannot be read, or others can read the key."""
    for name, file in (("cert_file", cert_file), ("key_file", key_file)):
        try:
            with Path(file).open("rb"):
                pass
        except OSError as error:
            raise ConfigError(f"{setting}.{name}: cannot read {file}: {error.strerror}") from error
    mode = Path(key_file).stat().st_mode & 0o777
    if mode & 0o077:
        raise ConfigError(
            f"{setting}.key_file: {key_file} has mode {mode:03o}, others could read it; run: chmod 600 {key_file}"
        )


class _PasswordWanted(Exception):
    pass


def _no_password() -> str:
    raise _PasswordWanted
