"""TCP sockets with a deadline: the only module that binds or connects one."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import resource
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_fleet.core import limits
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import ConfigError, PeerGone

if TYPE_CHECKING:
    import asyncio
    import ssl


def is_wildcard(host: str) -> bool:
    """Whether ``host`` means every interface."""
    try:
        return ipaddress.ip_address(host or "0.0.0.0").is_unspecified
    except ValueError:
        return False


def listen(
    host: str,
    port: int,
    *,
    setting: str,
    backlog: int = 128,
    allow_wildcard: bool = False,
    shared: bool = False,
    silent: bool = False,
) -> socket.socket:
    """A listening TCP socket; port 0 picks a free one.

    ``shared``: other processes of this user may listen there too, and the kernel deals connections out among them.
    ``silent``: the port is taken, but nothing is accepted on it.

    Raises:
        ConfigError: the port is taken, the address is not this machine's, or it is a wildcard that was not allowed;
            the message names ``setting``.
    """
    if is_wildcard(host) and not allow_wildcard:
        raise ConfigError(f"{setting}: {host!r} would listen on every interface; name one address of this machine")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise ConfigError(f"{setting}: the host name {host!r} does not resolve: {error.strerror}") from error
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        if not silent:
            listener.listen(backlog)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"{setting}: port {port} on {host} is taken; choose another, or 0 for a free one"
            ) from error
        if error.errno == errno.EADDRNOTAVAIL:
            raise ConfigError(f"{setting}: {host} is not an address of this machine") from error
        raise ConfigError(f"{setting}: cannot listen on {host}:{port}: {error.strerror}") from error
    return listener


def listen_unix(path: str, backlog: int) -> socket.socket:
    """A listening unix socket that only this user can connect to, in place of a file that is there.

    Raises:
        ConfigError: the path cannot be used.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        Path(path).unlink(missing_ok=True)
        listener.bind(path)
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {path}: {error.strerror or error}") from error
    finally:
        os.umask(mask)
    return listener


async def serve(
    listener: socket.socket, protocol: Callable[[], asyncio.Protocol], backlog: int, tls: ssl.SSLContext | None = None
) -> asyncio.Server:
    """Let the event loop accept on ``listener``, a protocol for each connection; the server then owns the socket."""
    import asyncio  # threads that only dial do not pay for it

    loop = asyncio.get_running_loop()
    if listener.family == socket.AF_UNIX:
        return await loop.create_unix_server(protocol, sock=listener, backlog=backlog)
    handshake_s = None if tls is None else limits.TLS_HANDSHAKE_S
    return await loop.create_server(
        protocol, sock=listener, backlog=backlog, ssl=tls, ssl_handshake_timeout=handshake_s
    )


def allow_many() -> int:
    """Let this process have as many files and sockets open as it may, and say how many: the usual 1,024 are few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return sys.maxsize if hard == resource.RLIM_INFINITY else hard


def free_port(host: str) -> int:
    """A TCP port of ``host`` that is free now; another process may take it before it is used."""
    with contextlib.closing(listen(host, 0, setting="free_port")) as probe:
        return int(probe.getsockname()[1])


def dial(host: str, port: int, deadline: Deadline) -> socket.socket:
    """A connected TCP socket without Nagle's delay.

    Raises:
        PeerGone: refused, unreachable or not answered before ``deadline``.
    """
    deadline.check(f"{host}:{port}", "connecting")
    try:
        connected = socket.create_connection((host, port), timeout=deadline.remaining())
    except TimeoutError as error:
        raise deadline.error(f"{host}:{port}", "connecting") from error
    except OSError as error:
        raise PeerGone(f"cannot connect to {host}:{port}: {error.strerror or error}") from error
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connected


def is_loopback(host: str) -> bool:
    """Whether ``host`` is reached from its own machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def local_address(peer: str) -> str:
    """This machine's address on the way to ``peer``; nothing is sent.

    Raises:
        PeerGone: there is no way.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise PeerGone(f"there is no way from here to {peer}: {error.strerror or error}") from error
