"""Link selection: the first transport that probes well, and why the better ones were passed over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vllm_fleet.core import log
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import LinkError
from vllm_fleet.fabric.contract import Link, Transport
from vllm_fleet.wire.fabric import PoolHandle


def choose_link(
    transports: Mapping[str, Transport], handles: Sequence[PoolHandle], peer: str, deadline: Deadline
) -> Link:
    """The best working link to a peer: our transports in our order of preference, where the peer has a handle for them.

    Raises:
        LinkError: none works; the message holds each one's reason.
    """
    by_name = {handle.transport: handle for handle in handles}
    passed_over: dict[str, str] = {}
    for name, transport in transports.items():
        handle = by_name.get(name)
        if handle is None:
            passed_over[name] = "the peer does not offer it"
            continue
        try:
            link = transport.connect(handle, deadline)
        except LinkError as error:
            passed_over[name] = str(error)
            continue
        log.event("link.chosen", peer=peer, transport=name, passed_over=passed_over)
        return link
    reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
    raise LinkError(f"no link to {peer}: {reasons or 'no transport is allowed'}")
