"""The two sides of `vllm-fleet bench fabric`: the owner's process, this side's pool, and what both have registered."""

from __future__ import annotations

import contextlib
import secrets
import subprocess
import sys
from collections.abc import Sequence

import msgspec

from vllm_fleet.bench import fabric_owner
from vllm_fleet.bench.blocks import Blocks, make_blocks
from vllm_fleet.bench.fabric_owner import FLEET, OwnerReady, OwnerSettings
from vllm_fleet.core.errors import PeerGone
from vllm_fleet.fabric.contract import Transport
from vllm_fleet.fabric.endpoint import Endpoint
from vllm_fleet.fabric.plan import BlockCopyPlan, Ints, plan_blocks
from vllm_fleet.net import sockets
from vllm_fleet.net.channel import Credentials


class Arena:
    """The owner's process, this side's pool, and what both have registered."""

    def __init__(self, names: Sequence[str], nbytes: int, cuda: tuple[int, int] | None) -> None:
        self.nbytes = nbytes
        self.cuda = cuda
        token = secrets.token_hex(32)
        command = [sys.executable, "-m", "vllm_fleet.bench.fabric_owner"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        settings = OwnerSettings(token, nbytes, tuple(names), None if cuda is None else cuda[1])
        self._say(msgspec.json.encode(settings).decode())
        self.token = bytes.fromhex(token)
        self.endpoint = Endpoint(sockets.listen("127.0.0.1", 0, setting="bench"), Credentials(FLEET, self.token))
        self.blocks: Blocks = make_blocks(nbytes, None if cuda is None else cuda[0], filled=False)
        self.transports, own = fabric_owner.register(tuple(names), self.endpoint, self.blocks)
        self.endpoint.start()
        self.owner = msgspec.json.decode(self._hear().encode(), type=OwnerReady)
        self.refused = {**own.refused, **self.owner.refused}

    def transport(self, name: str) -> Transport:
        """This side's transport of a name that was not refused."""
        transport: Transport = self.transports[name]
        return transport

    def plan(self, source: Ints, target: Ints) -> BlockCopyPlan:
        """A plan for these blocks in every region."""
        return plan_blocks(self.blocks.shapes, source.tolist(), target.tolist(), "bench")

    def owner_cpu_s(self) -> float:
        """CPU seconds the owner's process has used."""
        self._say("cpu")
        return float(self._hear())

    def close(self) -> None:
        """End both sides."""
        for transport in self.transports.values():
            transport.close()
        self.endpoint.close()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        self._process.stdout.close()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _hear(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PeerGone("the benchmark's owner process ended; its reason is on standard error")
        return line
