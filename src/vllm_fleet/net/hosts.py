"""Which Host headers may name a server that is not for browsers."""

from __future__ import annotations

import functools
import ipaddress
from urllib.parse import urlsplit


@functools.lru_cache(maxsize=64)
def is_ours(host: bytes, own_host: str) -> bool:
    """Whether a Host header may name us: a name that a stranger's DNS can point at us may not (DNS rebinding).

    ``own_host``: the name we listen on, in lower case.
    """
    try:
        name = urlsplit(f"//{host.decode('latin-1')}").hostname or ""
    except ValueError:
        return False
    if name in ("localhost", own_host):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
