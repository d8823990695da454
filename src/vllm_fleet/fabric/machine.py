"""What this machine offers for moving bytes: RDMA devices, and the interface of an address."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

_RDMA_DEVICES = Path("/sys/class/infiniband")
_SIOCGIFADDR = 0x8915


def has_rdma() -> bool:
    """Whether this machine has an RDMA device."""
    return _RDMA_DEVICES.is_dir() and any(_RDMA_DEVICES.iterdir())


def interface_of(host: str) -> str | None:
    """The network interface that holds an IPv4 address; None when none does, or ``host`` is no such address."""
    try:
        wanted = ipaddress.ip_address(host)
    except ValueError:
        return None
    if wanted.is_loopback:
        return "lo"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(query.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue  # the interface has no IPv4 address
            if ipaddress.ip_address(answer[20:24]) == wanted:
                return name
    return None
