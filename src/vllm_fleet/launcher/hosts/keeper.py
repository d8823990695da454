"""The one parent of a process on a node: ``python -m vllm_fleet.launcher.hosts.keeper FD``, started by a Ray actor.

It gets an Order in one line of JSON on standard input (argv is for everybody to read, an Order holds secrets), then
Send lines; it says Began or Failed, and at the end Ended, in lines on FD. Its standard output is the process's.

The process must not outlive its actor, however that ends. So three things hold on to one another: when the actor is
gone, standard input ends, and the keeper kills the tree and cleans up; when the keeper is gone, the kernel kills the
process (PR_SET_PDEATHSIG) and the actor, which sees FD end, the rest. Ray kills the children of a worker that it ends,
so the keeper is nobody's child (it forks), and has a session of its own.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import msgspec
from msgspec import Struct

from vllm_fleet.core.errors import FleetError
from vllm_fleet.launcher import processes
from vllm_fleet.launcher.child import PR_SET_CHILD_SUBREAPER, ChildProcess, own_environment, prctl
from vllm_fleet.launcher.hosts.late import Site, settle, settled
from vllm_fleet.launcher.spec import ProcessSpec
from vllm_fleet.net import sockets

REMEMBER_EVERY_S = 5.0
PREFIX = "fleet-node-"
DROPPED = "RAY_"
"""Ray's own variables, the cluster's token among them, are not for what runs here; the Order's env may name them."""
SIDE_TRIES_MAX = 200
READ_BYTES = 4096


class Order(Struct, frozen=True):
    """What to run. Words of hosts.late in ``argv``, ``env`` and ``files`` are replaced."""

    name: str
    argv: tuple[str, ...]
    env: dict[str, str]
    host: str
    """Address of this node for its ports."""
    sides: int = 0
    """Consecutive ports beside its own."""
    files: dict[str, str] = {}
    """Name -> content; written into its folder, mode 0600."""
    folders: tuple[str, ...] = ()
    """Folders that must be on this node, such as the model's."""


class Began(Struct, frozen=True, tag="began"):
    """It runs."""

    pid: int
    start: int
    mark: str
    """What its helpers have in their environment as ``child.MARK``."""
    site: Site


class Failed(Struct, frozen=True, tag="failed"):
    """It could not be started."""

    reason: str


class Ended(Struct, frozen=True, tag="ended"):
    """It has ended and nothing of it is left."""

    code: int


Report = Began | Failed | Ended


class Send(Struct, frozen=True):
    """Signal it and its helpers."""

    signum: int


decode_order = msgspec.json.Decoder(Order).decode
decode_report = msgspec.json.Decoder(Report).decode
_decode_send = msgspec.json.Decoder(Send).decode
_encode = msgspec.json.Encoder().encode


def encode_line(message: Order | Send | Report) -> bytes:
    """One line."""
    return bytes(_encode(message)) + b"\n"


def main() -> None:
    """Keep one process."""
    reports = int(sys.argv[1])
    order = decode_order(sys.stdin.buffer.readline())
    if os.fork():
        os._exit(0)
    os.setsid()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Only its actor ends it, and that one's end. Not SIG_IGN, which the process would inherit.
        signal.signal(signum, lambda *_: None)
    prctl(PR_SET_CHILD_SUBREAPER, 1)  # helpers whose parents die become its children: none can hide
    folder = tempfile.mkdtemp(prefix=PREFIX)
    try:
        try:
            child, site = _start(order, folder)
        except (FleetError, OSError) as error:
            _report(reports, Failed(str(error)))
            return
        _report(reports, Began(child.id.pid, child.id.start, child.mark, site))
        _report(reports, Ended(_keep(child)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start(order: Order, folder: str) -> tuple[ChildProcess, Site]:
    for wanted in order.folders:
        if not os.path.isdir(wanted):
            raise FleetError(f"there is no folder {wanted} on node {order.host}")
    environ = {name: value for name, value in own_environment().items() if not name.startswith(DROPPED)}
    cache = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-fleet"
    port, side = _ports(order.host, order.sides)
    site = Site(order.host, port, side, folder, str(cache), sys.executable)
    for name, content in order.files.items():
        path = os.open(os.path.join(folder, os.path.basename(name)), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(path, "w", encoding="utf-8") as stream:
            stream.write(settle(content, site))
    spec = settled(ProcessSpec(order.name, "instance", "", order.argv, "", order.env, tmp=folder), site)
    return ChildProcess(spec, None, environ, tied=True), site


def _ports(host: str, sides: int) -> tuple[int, int]:
    """A free port, and the first of so many consecutive free ones (0 for none)."""
    with contextlib.ExitStack() as held:
        port = int(held.enter_context(sockets.listen(host, 0, setting="fabric.host")).getsockname()[1])
        if not sides:
            return port, 0
        for _ in range(SIDE_TRIES_MAX):
            first = int(held.enter_context(sockets.listen(host, 0, setting="fabric.host")).getsockname()[1])
            with contextlib.ExitStack() as probes, contextlib.suppress(FleetError, OverflowError):
                for other in range(first + 1, first + sides):
                    probes.enter_context(sockets.listen(host, other, setting="fabric.host"))
                return port, first
    raise FleetError(f"found no {sides} consecutive free ports on {host} in {SIDE_TRIES_MAX} tries")


def _keep(child: ChildProcess) -> int:
    """Stay until it has ended, or until whoever gives orders is gone; its exit code."""
    ended = os.pidfd_open(child.pid)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(0, select.POLLIN | select.POLLHUP)
    rest = b""
    while not child.poll():
        ready = {handle for handle, _ in poll.poll(REMEMBER_EVERY_S * 1000)}
        if 0 in ready:
            read = os.read(0, READ_BYTES)
            if not read:
                child.remember(processes.table())
                child.signal_group(signal.SIGKILL)
                break
            *lines, rest = (rest + read).split(b"\n")
            for line in lines:
                child.remember(processes.table())
                child.signal_group(signal.Signals(_decode_send(line).signum))
        elif not ready:
            child.remember(processes.table())
            _reap(child.pid)
    os.close(ended)
    child.tree |= {row.id for row in processes.table() if row.parent == os.getpid() and row.id != child.id}
    return child.bury()


def _reap(but: int) -> None:
    """Let go of helpers that ended after their own parents."""
    me = os.getpid()
    for row in processes.table():
        if row.parent == me and row.zombie and row.id.pid != but:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(row.id.pid, os.WNOHANG)


def _report(handle: int, report: Report) -> None:
    with contextlib.suppress(BrokenPipeError):  # the actor is gone; there is still cleaning up to do
        os.write(handle, encode_line(report))


if __name__ == "__main__":
    main()
