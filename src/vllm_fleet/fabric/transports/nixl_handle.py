"""What a nixl handle tells a peer, and which way reads take between two sides."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from vllm_fleet.core import limits
from vllm_fleet.core.errors import LinkError
from vllm_fleet.fabric.machine import has_rdma, interface_of
from vllm_fleet.fabric.transports.cma import host_id
from vllm_fleet.fabric.transports.nixl_agent import NONCE_BYTES
from vllm_fleet.wire.fabric import PoolHandle
from vllm_fleet.wire.names import DECODE_ERRORS, Count, Port

DETAILS_BYTES_MAX = 64 << 10


class MachineFacts(Struct, frozen=True):
    """What decides whether UCX can read a side's memory without its help."""

    machine: Annotated[str, Meta(max_length=limits.ID_LEN_MAX)]
    rdma: bool
    tcp_only: bool


class NixlDetails(Struct, frozen=True):
    """The nixl part of a PoolHandle. Addresses are given to NIXL only, which checks them against the metadata."""

    host: Annotated[str, Meta(min_length=1, max_length=255)]
    port: Port
    """The owner's endpoint, for the control connection."""
    machine: Annotated[str, Meta(max_length=limits.ID_LEN_MAX)]
    rdma: bool
    tcp_only: bool
    device: Annotated[int, Meta(ge=-1, le=1023)]
    """CUDA device of the regions; -1 for CPU memory."""
    addresses: Annotated[tuple[Count, ...], Meta(max_length=limits.REGIONS_MAX)]
    nonce_address: Count
    nonce: Annotated[bytes, Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
    landing_address: Count
    metadata: Annotated[bytes, Meta(min_length=1, max_length=DETAILS_BYTES_MAX)]
    """Of the NIXL agent: its name, UCX addresses and memory keys."""

    @property
    def facts(self) -> MachineFacts:
        """The part that decides the way of reads."""
        return MachineFacts(self.machine, self.rdma, self.tcp_only)


encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(NixlDetails).decode


def decode(peer: PoolHandle) -> NixlDetails:
    """The details of a peer's handle; LinkError when they cannot be used."""
    try:
        details: NixlDetails = _decode(peer.details)
    except DECODE_ERRORS as error:
        raise LinkError(f"the peer's nixl handle cannot be read: {error}") from error
    if len(details.addresses) != len(peer.region_bytes):
        raise LinkError("the peer's nixl handle is inconsistent")
    return details


def can_pull(own: MachineFacts, theirs: MachineFacts) -> bool:
    """Whether the reader may pull: UCX needs no help of the owner's threads between these two sides."""
    if own.tcp_only or theirs.tcp_only:
        return False
    return own.machine == theirs.machine or (own.rdma and theirs.rdma)


def machine_facts(ucx: Mapping[str, str]) -> MachineFacts:
    """The facts of this process under these UCX settings."""
    return MachineFacts(machine=host_id(), rdma=has_rdma(), tcp_only=ucx.get("TLS") == "tcp")


def settle(ucx: Mapping[str, str], host: str) -> dict[str, str]:
    """UCX settings for an endpoint on ``host``: bound to its network interface where nothing else is asked for."""
    settled = dict(ucx)
    if "NET_DEVICES" not in settled:
        interface = interface_of(host)
        if interface is not None and (ipaddress.ip_address(host).is_loopback or not has_rdma()):
            settled["NET_DEVICES"] = interface
    return settled
