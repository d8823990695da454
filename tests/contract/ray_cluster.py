"""A small Ray cluster on this machine, with a token: a head, and workers where a test wants them."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vllm_fleet.launcher import processes
from vllm_fleet.net import sockets

RAY = str(Path(sys.executable).parent / "ray")
UP_S = 60.0


class RayNode:
    """One `ray start --block`; all it started goes with it."""

    def __init__(self, words: Sequence[str], environ: Mapping[str, str], prefix: Sequence[str] = ()) -> None:
        common = ["--disable-usage-stats", "--object-store-memory", str(80 << 20), "--block"]
        self._process = subprocess.Popen(
            [*prefix, RAY, "start", *words, *common], env=dict(environ), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self.pid = self._process.pid

    def running(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """As a power cut does it: all at once. Processes in other sessions are left to those who keep them."""
        tree = {row.id for row in processes.table() if row.session == self.pid}
        left = processes.kill(tree, 10.0)
        self._process.wait(10.0)
        assert not left


class RayCluster:
    """A head, and further nodes."""

    def __init__(
        self, *, host: str = "127.0.0.1", cpus: int = 4, gpus: int = 0, client: bool = False, in_process: bool = False,
        head: Callable[[int], Sequence[str]] | None = None,
    ) -> None:  # fmt: skip
        """``in_process``: this process is to be a driver. ``head``: how to start the head, from its port."""
        self.folder = tempfile.mkdtemp(prefix="r")  # short: unix sockets are put deep inside
        # Ray reads its mode when it is imported. Where something did that already, there can be no token.
        secure = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.settings = {} if in_process and "ray" in sys.modules else secure
        self.environ = {**os.environ, **self.settings}
        port = sockets.free_port("127.0.0.1")
        self.address = f"{host}:{port}"
        first = ["--head", "--node-ip-address", host, "--port", str(port)] if head is None else head(port)
        words = [*first, "--num-cpus", str(cpus), "--temp-dir", self.folder]
        words += ["--include-dashboard", "false", "--include-log-monitor", "false"]
        words += ["--num-gpus", str(gpus)] if gpus else []
        if client:
            # Ray's head tells its client server port 0 for the agent that makes its servers, unless it is given one.
            asked = sockets.free_port("127.0.0.1")
            words += ["--ray-client-server-port", str(asked)]
            words += ["--runtime-env-agent-port", str(sockets.free_port("127.0.0.1"))]
            self.client = f"ray://{host}:{asked}"
        self.nodes = [RayNode(words, self.environ)]
        try:
            self._wait(lambda: _answers(host, port))
        except BaseException:
            self.close()
            raise

    def join(self, words: Sequence[str], prefix: Sequence[str] = ()) -> RayNode:
        """Add a node."""
        self.nodes.append(RayNode(["--address", self.address, *words], self.environ, prefix))
        return self.nodes[-1]

    def wait_for_nodes(self, count: int) -> None:
        """Until so many nodes have joined."""
        looked = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False, logging_level='ERROR'); "
        looked += "import time\nuntil = time.monotonic() + 60\n"
        looked += f"while sum(node['Alive'] for node in ray.nodes()) < {count}:\n"
        looked += "    assert time.monotonic() < until; time.sleep(0.1)"
        words = [sys.executable, "-c", looked, self.address]
        subprocess.run(words, env=self.environ, check=True, timeout=120, stdin=subprocess.DEVNULL)

    def _wait(self, done: Callable[[], bool]) -> None:
        until = time.monotonic() + UP_S
        while not done():
            assert self.nodes[0].running(), "the head of the Ray cluster ended"
            assert time.monotonic() < until, "the head of the Ray cluster does not answer"
            time.sleep(0.1)

    def close(self) -> None:
        for node in reversed(self.nodes):
            node.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def _answers(host: str, port: int) -> bool:
    from vllm_fleet.core.deadline import Deadline
    from vllm_fleet.core.errors import PeerGone

    with contextlib.suppress(PeerGone):
        sockets.dial(host, port, Deadline.after(1.0, "test")).close()
        return True
    return False
