"""The handshake of every fabric connection: both sides prove the fleet's token before anything else is read. Sans-IO.

    client                                    server
    ClientHello(versions, fleet, nonce)  ──>
                                         <──  ServerHello(version, nonce, proof)      or  Refused(reason)
    ClientProof(proof)                   ──>
                                         <──  Welcome()                               or  the connection closes

A proof is HMAC-SHA256 under the fleet's token of the sender's role and both hellos, so that it fits one connection and
one direction only: replayed or mirrored messages prove nothing. The token itself never travels. A wrong token, another
fleet and a broken message end alike: the connection closes.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from vllm_fleet.core.errors import AuthError, LinkError
from vllm_fleet.wire.names import DECODE_ERRORS, Count, Name

VERSION = 1
"""The wire version this build speaks."""

VERSION_MIN = 1
"""The oldest wire version this build understands."""

Nonce = Annotated[bytes, Meta(min_length=32, max_length=32)]
Proof = Annotated[bytes, Meta(min_length=32, max_length=32)]


class ClientHello(Struct, frozen=True, tag="client_hello"):
    version_min: Count
    version_max: Count
    fleet: Name
    nonce: Nonce


class ServerHello(Struct, frozen=True, tag="server_hello"):
    version: Count
    nonce: Nonce
    proof: Proof


class ClientProof(Struct, frozen=True, tag="client_proof"):
    proof: Proof


class Welcome(Struct, frozen=True, tag="welcome"):
    pass


class Refused(Struct, frozen=True, tag="refused"):
    """Sent instead of ServerHello when no common version exists; carries nothing a stranger may not know."""

    version_min: Count
    version_max: Count


_encode = msgspec.msgpack.Encoder().encode
_decode_client_hello = msgspec.msgpack.Decoder(ClientHello).decode
_decode_client_proof = msgspec.msgpack.Decoder(ClientProof).decode
_decode_server_answer = msgspec.msgpack.Decoder(ServerHello | Refused).decode
_decode_welcome = msgspec.msgpack.Decoder(Welcome).decode


def _proof(token: bytes, role: bytes, client_hello: bytes, server_nonce: bytes, version: int) -> bytes:
    transcript = hashlib.sha256(client_hello).digest() + server_nonce + version.to_bytes(8, "big")
    return hmac.digest(token, b"vllm-fleet/" + role + b"/" + transcript, "sha256")


class ClientHandshake:
    """The dialling side. Send ``start()``, then what each ``receive(frame)`` returns, until ``done``."""

    def __init__(self, token: bytes, fleet: str) -> None:
        self._token = token
        self._hello = _encode(ClientHello(VERSION_MIN, VERSION, fleet, secrets.token_bytes(32)))
        self._proved = False
        self.done = False

    def start(self) -> bytes:
        """The first frame's payload."""
        return self._hello

    def receive(self, payload: bytes) -> bytes | None:
        """Take the server's next frame; the payload to send next, or None when the handshake is complete.

        Raises:
            LinkError: no common wire version; the message holds both sides' versions.
            AuthError: the server did not prove the token.
        """
        try:
            if self._proved:
                _decode_welcome(payload)
                self.done = True
                return None
            answer = _decode_server_answer(payload)
        except DECODE_ERRORS:
            raise AuthError("the peer did not prove the fleet's token") from None
        if isinstance(answer, Refused):
            raise LinkError(
                f"no common wire version: the peer speaks {answer.version_min} to {answer.version_max}, "
                f"this process {VERSION_MIN} to {VERSION}"
            )
        wanted = _proof(self._token, b"server", self._hello, answer.nonce, answer.version)
        if not hmac.compare_digest(wanted, answer.proof):
            raise AuthError("the peer did not prove the fleet's token")
        self._proved = True
        return _encode(ClientProof(_proof(self._token, b"client", self._hello, answer.nonce, answer.version)))


class ServerHandshake:
    """The listening side. Send what each ``receive(frame)`` returns; ``done`` says that the peer proved the token."""

    def __init__(self, token: bytes, fleet: str) -> None:
        self._token = token
        self._fleet = fleet
        self._nonce = secrets.token_bytes(32)
        self._expected: bytes | None = None
        self.done = False

    def receive(self, payload: bytes) -> bytes:
        """Take the client's next frame; the payload to answer with.

        Raises:
            AuthError: the client did not prove the token, or sent what is no handshake. Close without an answer.
        """
        try:
            if self._expected is None:
                return self._answer_hello(payload)
            proof = _decode_client_proof(payload)
        except DECODE_ERRORS:
            raise AuthError("the peer did not prove the fleet's token") from None
        if not hmac.compare_digest(self._expected, proof.proof):
            raise AuthError("the peer did not prove the fleet's token")
        self.done = True
        return _encode(Welcome())

    def _answer_hello(self, payload: bytes) -> bytes:
        hello = _decode_client_hello(payload)
        if not hmac.compare_digest(hello.fleet.encode(), self._fleet.encode()):
            raise AuthError("the peer did not prove the fleet's token")
        version = min(VERSION, hello.version_max)
        if version < max(VERSION_MIN, hello.version_min):
            return _encode(Refused(VERSION_MIN, VERSION))
        self._expected = _proof(self._token, b"client", payload, self._nonce, version)
        proof = _proof(self._token, b"server", payload, self._nonce, version)
        return _encode(ServerHello(version, self._nonce, proof))
