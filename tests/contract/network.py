"""A second host here: a network namespace, joined by a virtual cable (veth pair). Needs root and iproute2."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
from pathlib import Path


def missing() -> str | None:
    """Why there can be no second host here; None when there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "network namespaces need the commands ip and tc (Debian: iproute2)"
    probe = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False)
    return None if probe.returncode == 0 else "this system does not let root make network namespaces"


def run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout


class SecondHost:
    """A namespace with the address ``there``; this process's side of the cable has ``here``."""

    def __init__(self) -> None:
        number = os.getpid()
        self.name, self.cable, self._far = f"fleet{number}", f"vfa{number}", f"vfb{number}"
        net = f"10.77.{100 + number % 150}"
        self.here, self.there = f"{net}.1", f"{net}.2"
        self.prefix = ("ip", "netns", "exec", self.name)
        run("ip", "netns", "add", self.name)
        try:
            run("ip", "link", "add", self.cable, "type", "veth", "peer", "name", self._far, "netns", self.name)
            run("ip", "addr", "add", f"{self.here}/30", "dev", self.cable)
            run("ip", "link", "set", self.cable, "up")
            run(*self.prefix, "ip", "addr", "add", f"{self.there}/30", "dev", self._far)
            run(*self.prefix, "ip", "link", "set", self._far, "up")
            run(*self.prefix, "ip", "link", "set", "lo", "up")
        except BaseException:
            self.close()
            raise

    def plug(self, *, connected: bool) -> None:
        """Connect or cut the cable."""
        run("ip", "link", "set", self.cable, "up" if connected else "down")

    def state(self) -> str:
        """The link's state as the kernel tells it: up or down."""
        return Path(f"/sys/class/net/{self.cable}/operstate").read_text().strip()

    def limit(self, rate: str) -> str:
        """Let both directions carry no more than ``rate`` (tc's notation); what tc says it does."""
        shape = ("root", "tbf", "rate", rate, "burst", "32kbit", "latency", "400ms")
        run("tc", "qdisc", "replace", "dev", self.cable, *shape)
        run(*self.prefix, "tc", "qdisc", "replace", "dev", self._far, *shape)
        return run(*self.prefix, "tc", "qdisc", "show", "dev", self._far)

    def sent_bytes(self) -> int:
        """Bytes that the second host has sent over the cable."""
        return int(Path(f"/sys/class/net/{self.cable}/statistics/rx_bytes").read_text())

    def reset(self) -> None:
        """The cable plugged in and as fast as it can be."""
        self.plug(connected=True)
        for prefix, end in (((), self.cable), (self.prefix, self._far)):
            subprocess.run([*prefix, "tc", "qdisc", "del", "dev", end, "root"], capture_output=True, check=False)

    def close(self) -> None:
        """The cable goes with the namespace."""
        subprocess.run(["ip", "link", "del", self.cable], capture_output=True, check=False)
        run("ip", "netns", "del", self.name)


@functools.cache
def second_host() -> SecondHost:
    """The one for all tests: UCX reads the routing table once in a process's life and reaches no later interface."""
    host = SecondHost()
    atexit.register(host.close)
    return host
