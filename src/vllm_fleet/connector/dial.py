"""Connections to one prefill worker: one for questions, one over which it tells progress, and the link for bytes."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import Corrupt, FleetError, LinkError
from vllm_fleet.fabric.contract import KVPool
from vllm_fleet.fabric.endpoint import ask
from vllm_fleet.fabric.integrity import Mode, Verifier
from vllm_fleet.fabric.plan import BlockCopyPlan, BlockShape
from vllm_fleet.fabric.select import Chosen, LinkSelector
from vllm_fleet.net.channel import Channel, Credentials, connect
from vllm_fleet.wire import fabric as wire
from vllm_fleet.wire.control import MAY_DIFFER
from vllm_fleet.wire.names import DECODE_ERRORS
from vllm_fleet.wire.ticket import WorkerAddress

Updates = tuple[wire.Update, ...]


@dataclass(frozen=True)
class Self:
    """What a worker needs to know about itself to load from others."""

    credentials: Credentials
    selector: LinkSelector
    pool: KVPool
    layout: Mapping[str, str]
    checksums: Mode

    @property
    def shapes(self) -> tuple[BlockShape, ...]:
        """How each region is cut into blocks."""
        return tuple(BlockShape(r.block_bytes, r.block_stride, r.blocks) for r in self.pool.regions)


class Connection:
    """Everything between this worker and one other. Belongs to one thread, but for abort()."""

    def __init__(self, own: Self, name: str, channel: Channel, heard: Channel, described: wire.Description) -> None:
        self.channel = channel
        self.engine = described.engine
        self.follower = secrets.token_hex(16)
        self.shapes = tuple(BlockShape(s.block_bytes, s.block_stride, s.blocks) for s in described.shapes)
        self.verifier = Verifier(own.pool, own.checksums, np.random.default_rng())
        self._own, self._name, self._heard, self._described = own, name, heard, described
        self._chosen: Chosen | None = None
        self._closed = False

    def use_link(self, deadline: Deadline) -> Chosen:
        """The link, made now unless there is one.

        Raises:
            LinkError: the two sides keep KV differently, or no transport reaches the peer.
        """
        if self._chosen is None:
            check_layout(self._own.layout, self._described.layout, self._name)
            self._chosen = self._own.selector.choose(self._described.handles, self._name, deadline)
            self.verifier = Verifier(self._own.pool, self._own.checksums, np.random.default_rng())
        return self._chosen

    def prepare(self, plan: BlockCopyPlan) -> None:
        """Get a read ready that will most likely be asked for, where the link gains by it."""
        if self._chosen is not None:
            self._chosen.link.prepare(plan)

    def drop_link(self) -> None:
        """Close the link; the next use makes another."""
        chosen, self._chosen = self._chosen, None
        if chosen is not None:
            chosen.link.close()

    @property
    def transport(self) -> str:
        """What the link moves bytes by; "none" where there is none."""
        return self._chosen.link.transport if self._chosen is not None else "none"

    def is_open(self) -> bool:
        """Whether nobody has closed it, as far as this side has heard."""
        return not self._closed and self.channel.is_open()

    def follow(self, tell: Callable[[Updates | None], None]) -> None:
        """Call ``tell`` from a thread of its own with what the peer says, and with None when the connection ends."""
        name = f"fleet-hear-{self._name.rpartition(':')[2]}"
        threading.Thread(target=self._hear, args=(tell,), name=name, daemon=True).start()

    def abort(self) -> None:
        """End it from another thread; whoever waits for the peer wakes with PeerGone."""
        self._closed = True
        self.channel.abort()
        self._heard.abort()

    def close(self) -> None:
        """End it. Safe to call twice."""
        self._closed = True
        self.drop_link()
        self.channel.close()
        self._heard.abort()  # its own thread closes it

    def _hear(self, tell: Callable[[Updates | None], None]) -> None:
        try:
            while (payload := self._heard.receive_idle()) is not None:
                told = wire.decode_answer(payload)
                if not isinstance(told, wire.Progress):
                    break
                tell(told.updates)
        except (FleetError, *DECODE_ERRORS):
            pass  # told below as every other end
        finally:
            self._closed = True
            self._heard.close()
            tell(None)


def dial(address: WorkerAddress, own: Self, deadline: Deadline) -> Connection:
    """Connect to a prefill worker, and have it tell how transfers get on.

    Raises:
        PeerGone: not reachable. Corrupt: it does not answer as a worker does.
    """
    name = f"{address.host}:{address.port}"
    channels: list[Channel] = []
    try:
        channels.append(connect(address.host, address.port, own.credentials, deadline))
        channels.append(connect(address.host, address.port, own.credentials, deadline))
        channel, heard = channels
        described = ask(channel, wire.Describe(), deadline)
        if not isinstance(described, wire.Description):
            raise LinkError(f"{name} does not describe itself")
        made = Connection(own, name, channel, heard, described)
        if ask(heard, wire.Follow(made.follower), deadline) != wire.Following():
            raise Corrupt(f"{name} does not tell how transfers get on")
        return made
    except BaseException:
        for opened in channels:
            opened.close()
        raise


def check_layout(own: Mapping[str, str], theirs: Mapping[str, str], peer: str) -> None:
    """LinkError naming every value in which two workers' KV differ."""
    keys = sorted((own.keys() | theirs.keys()) - MAY_DIFFER)
    differing = [f"{k}: {own.get(k)!r} here, {theirs.get(k)!r} there" for k in keys if own.get(k) != theirs.get(k)]
    if differing:
        raise LinkError(f"{peer} keeps its KV differently ({'; '.join(differing)})")
