"""The handshake: who proves the token gets in, and nobody else; replayed, mirrored or damaged messages do not."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_fleet.core.errors import AuthError, LinkError
from vllm_fleet.wire import auth
from vllm_fleet.wire.auth import ClientHandshake, ServerHandshake

TOKEN = bytes(range(32))


def shake(client: ClientHandshake, server: ServerHandshake) -> list[bytes]:
    """Run both sides against each other; every message in order."""
    sent: list[bytes] = []
    message: bytes | None = client.start()
    while message is not None:
        sent.append(message)
        sent.append(server.receive(message))
        message = client.receive(sent[-1])
    return sent


def test_both_sides_prove_the_token() -> None:
    client, server = ClientHandshake(TOKEN, "f"), ServerHandshake(TOKEN, "f")
    messages = shake(client, server)
    assert client.done
    assert server.done
    assert len(messages) == 4
    assert all(TOKEN not in message for message in messages)


@pytest.mark.parametrize(("token", "fleet"), [(bytes(32), "f"), (TOKEN, "g"), (TOKEN[:-1], "f")])
def test_another_token_or_fleet_is_refused_by_the_client_or_the_server(token: bytes, fleet: str) -> None:
    server = ServerHandshake(TOKEN, "f")
    with pytest.raises(AuthError) as caught:
        shake(ClientHandshake(token, fleet), server)
    assert str(caught.value) == "the peer did not prove the fleet's token"
    assert not server.done


def test_a_client_that_skips_checking_the_server_still_needs_the_token() -> None:
    server = ServerHandshake(TOKEN, "f")
    server.receive(ClientHandshake(bytes(32), "f").start())
    with pytest.raises(AuthError):
        server.receive(msgspec.msgpack.encode(auth.ClientProof(bytes(32))))
    assert not server.done


def test_a_replayed_handshake_is_refused() -> None:
    messages = shake(ClientHandshake(TOKEN, "f"), ServerHandshake(TOKEN, "f"))
    again = ServerHandshake(TOKEN, "f")
    again.receive(messages[0])
    with pytest.raises(AuthError):
        again.receive(messages[2])
    assert not again.done


def test_a_mirrored_proof_is_refused() -> None:
    server = ServerHandshake(TOKEN, "f")
    answer = msgspec.msgpack.decode(server.receive(ClientHandshake(TOKEN, "f").start()), type=auth.ServerHello)
    with pytest.raises(AuthError):
        server.receive(msgspec.msgpack.encode(auth.ClientProof(answer.proof)))


def test_a_server_without_the_token_is_refused() -> None:
    client = ClientHandshake(TOKEN, "f")
    client.start()
    with pytest.raises(AuthError):
        client.receive(msgspec.msgpack.encode(auth.ServerHello(auth.VERSION, bytes(32), bytes(32))))
    with pytest.raises(AuthError):
        client.receive(msgspec.msgpack.encode(auth.Welcome()))


def test_no_common_version_names_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    server = ServerHandshake(TOKEN, "f")
    client = ClientHandshake(TOKEN, "f")
    hello = msgspec.msgpack.decode(client.start(), type=auth.ClientHello)
    newer = msgspec.structs.replace(hello, version_min=auth.VERSION + 1, version_max=auth.VERSION + 2)
    answer = server.receive(msgspec.msgpack.encode(newer))
    with pytest.raises(LinkError, match=f"the peer speaks {auth.VERSION_MIN} to {auth.VERSION}, this process"):
        client.receive(answer)


def test_a_newer_client_that_still_speaks_ours_is_welcome_to_the_older_version() -> None:
    server = ServerHandshake(TOKEN, "f")
    hello = msgspec.msgpack.decode(ClientHandshake(TOKEN, "f").start(), type=auth.ClientHello)
    newer = msgspec.structs.replace(hello, version_max=auth.VERSION + 5)
    answer = msgspec.msgpack.decode(server.receive(msgspec.msgpack.encode(newer)), type=auth.ServerHello)
    assert answer.version == auth.VERSION


@given(st.binary(max_size=600))
def test_garbage_is_an_auth_error_and_nothing_else(garbage: bytes) -> None:
    with pytest.raises(AuthError):
        ServerHandshake(TOKEN, "f").receive(garbage)
    second = ServerHandshake(TOKEN, "f")
    second.receive(ClientHandshake(TOKEN, "f").start())
    with pytest.raises(AuthError):
        second.receive(garbage)
    with pytest.raises(AuthError):
        ClientHandshake(TOKEN, "f").receive(garbage)


def test_every_flipped_bit_of_a_proof_is_found_and_none_elsewhere_does_harm() -> None:
    length = len(shake(ClientHandshake(TOKEN, "f"), ServerHandshake(TOKEN, "f"))[2])
    for bit in range(8 * length):
        server = ServerHandshake(TOKEN, "f")
        client = ClientHandshake(TOKEN, "f")
        real = client.receive(server.receive(client.start()))
        assert real is not None
        broken = bytearray(real)
        broken[bit // 8] ^= 1 << (bit % 8)
        if bit // 8 >= length - 32:
            with pytest.raises(AuthError):
                server.receive(bytes(broken))
            continue
        try:  # a bit of the envelope: refused, or the very same proof in another spelling
            server.receive(bytes(broken))
        except AuthError:
            continue
        assert msgspec.msgpack.decode(bytes(broken), type=auth.ClientProof) == msgspec.msgpack.decode(
            real, type=auth.ClientProof
        )
