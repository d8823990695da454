"""A whole router in this process: keys at its door, salts, TLS, the operators' own address, ids, tenants in metrics."""

from __future__ import annotations

import asyncio
import datetime
import json
import ssl
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.unit.mock_instance import TOKEN, Fleet, fleet, pair, until
from vllm_fleet.config.connector import bearer
from vllm_fleet.config.front_settings import FrontSettings
from vllm_fleet.config.keys import add_key, revoke_key
from vllm_fleet.core import limits
from vllm_fleet.core.env import RealEnv
from vllm_fleet.core.errors import ConfigError
from vllm_fleet.net import tls
from vllm_fleet.router.front import Front, make_front


def front(**settings: Any) -> Front:
    return make_front(FrontSettings(**settings), "f", TOKEN, RealEnv())


def auth(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


# Keys --------------------------------------------------------------------------------------------------------------


async def test_who_has_no_key_gets_nothing_but_health(tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys", "alice")
    p, d = pair()
    async with fleet(p, d, front=front(keys_file=str(tmp_path / "keys")), admin=True) as up:
        for given in ({}, auth("vf-wrong"), auth(""), {"authorization": "Basic x"}, auth(key + "x")):
            for path in ("/v1/completions", "/v1/models", "/unknown", "/metrics", "/fleet/v1/requests/x"):
                async with up.http.post(up.router.url + path, data=b"{}", headers=given) as answer:
                    said = await answer.json()
                    assert (answer.status, said["error"]["code"]) == (401, "invalid_api_key"), path
                    assert said["error"].keys() == {"message", "type", "param", "code"}
                    assert answer.headers["www-authenticate"] == "Bearer"
        assert p.seen == d.seen == []
        assert (await up.get("/health"))[0] == 200
        status, _, _ = await up.post({"prompt": "hi"}, **auth(key))
        assert status == 200
        status, _, _ = await up.post({"prompt": "hi"}, **{"x-api-key": key})
        assert status == 200
        for seen in (*p.seen, *d.seen):
            assert "authorization" not in seen.headers
            assert "x-api-key" not in seen.headers
        status, said, _ = await up.post({"prompt": "hi"}, "/v1/unknown", **auth(key))
        assert (status, said["error"]["code"]) == (404, "unknown_path")


async def test_a_large_body_without_a_key_is_not_read(tmp_path: Path) -> None:
    add_key(tmp_path / "keys", "alice")
    async with fleet(*pair(), front=front(keys_file=str(tmp_path / "keys"))) as up:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(up.router.url.rpartition(":")[2]))
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: 50000000\r\n\r\n".encode())
        assert b"401" in await reader.readline()  # before any of the body was sent
        writer.close()


async def test_keys_are_added_and_revoked_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FILES_CHECK_S", 0.01)
    file = tmp_path / "keys"
    first = add_key(file, "alice")
    at = front(keys_file=str(file))
    async with fleet(*pair(), front=at) as up:
        second = add_key(file, "bob")
        await until(lambda: at.tenants.of(auth(second)) == "bob")
        revoke_key(file, "alice")
        await until(lambda: at.tenants.of(auth(first)) is None)
        assert (await up.post({"prompt": "hi"}, **auth(second)))[0] == 200
        assert (await up.post({"prompt": "hi"}, **auth(first)))[0] == 401
        file.write_text("broken\n")
        file.chmod(0o600)
        await at.refresher.look()
        assert at.tenants.of(auth(second)) == "bob"  # what was read before stays in use
        file.unlink()
        await at.refresher.look()
        assert at.tenants.of(auth(second)) == "bob"


async def test_without_a_keys_file_nobody_is_asked_and_keys_go_to_instances() -> None:
    p, d = pair()
    async with fleet(p, d) as up:
        assert (await up.post({"prompt": "hi"}, **auth("sk-x")))[0] == 200
        assert d.seen[0].headers["authorization"] == "Bearer sk-x"
        assert "cache_salt" not in d.seen[0].body


# Salts -------------------------------------------------------------------------------------------------------------


async def test_two_tenants_never_send_one_salt(tmp_path: Path) -> None:
    keys = [add_key(tmp_path / "keys", name) for name in ("alice", "bob")]
    p, d = pair()
    async with fleet(p, d, front=front(keys_file=str(tmp_path / "keys"))) as up:
        for key in keys:
            for salt in (None, "mine"):
                body = {"prompt": "hi"} if salt is None else {"prompt": "hi", "cache_salt": salt}
                assert (await up.post(body, **auth(key)))[0] == 200
        made = [seen.body["cache_salt"] for seen in d.seen]
        assert len(set(made)) == 4
        assert [seen.body["cache_salt"] for seen in p.seen] == made  # the ticket's digest covers it
        assert "mine" not in made
        alice, _, bob, _ = made
        assert (await up.post({"prompt": "hi", "cache_salt": bob}, **auth(keys[0])))[0] == 200
        assert d.seen[-1].body["cache_salt"] not in made
        assert (await up.post({"prompt": "hi"}, **auth(keys[0])))[0] == 200
        assert d.seen[-1].body["cache_salt"] == alice


@pytest.mark.parametrize("salt", [7, "", "a/b", {}, ["x"], "x" * 129])
async def test_a_salt_that_is_none_is_refused(salt: object) -> None:
    p, d = pair()
    async with fleet(p, d) as up:
        status, said, _ = await up.post({"prompt": "hi", "cache_salt": salt})
        assert (status, said["error"]["code"], said["error"]["param"]) == (400, "invalid_cache_salt", "cache_salt")
        assert p.seen == d.seen == []


async def test_salts_can_be_left_to_clients(tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys", "alice")
    p, d = pair()
    async with fleet(p, d, front=front(keys_file=str(tmp_path / "keys"), tenant_salt="off")) as up:
        await up.post({"prompt": "hi", "cache_salt": "mine"}, **auth(key))
        await up.post({"prompt": "hi"}, **auth(key))
        assert [seen.body.get("cache_salt") for seen in d.seen] == ["mine", None]


# Ids ---------------------------------------------------------------------------------------------------------------


async def test_two_clients_with_one_request_id_are_two_requests_to_instances() -> None:
    p, d = pair()
    async with fleet(p, d) as up:
        for _ in range(2):
            _, _, headers = await up.post({"prompt": "hi"}, **{"x-request-id": "same"})
            assert headers["x-request-id"] == "same"
        first, second = (seen.headers["x-request-id"] for seen in d.seen)
        assert first != second
        assert "same" not in first + second
        async with up.http.get(f"{up.router.url}/fleet/v1/requests/same", headers=auth(bearer(TOKEN))) as answer:
            assert (await answer.json())["inner_id"] == second


async def test_steering_headers_of_clients_stay_outside() -> None:
    p, d = pair()
    inside = ("x-fleet-prefill", "x-fleet-decode", "x-fleet-handoff", "x-data-parallel-rank", "x-priority", "x-kv-host")
    async with fleet(p, d) as up:
        _, _, headers = await up.post({"prompt": "hi"}, **dict.fromkeys(inside, "evil"), traceparent="00-a-b-01")
        for seen in (*p.seen, *d.seen):
            assert not set(inside) & seen.headers.keys()
            assert seen.headers["traceparent"] == "00-a-b-01"  # passed on as it is where we trace nothing
        assert "evil" not in headers.values()


# The operators' own address ----------------------------------------------------------------------------------------


async def asked(up: Fleet, path: str, method: str = "GET", **headers: str) -> int:
    async with up.http.request(method, up.router.admin_url + path, headers=headers) as answer:
        return answer.status


async def test_metrics_and_timelines_are_not_where_clients_are() -> None:
    async with fleet(*pair(), admin=True) as up:
        await up.post({"prompt": "hi"}, **{"x-request-id": "r"})
        assert up.router.admin_url != up.router.url
        for path in ("/metrics", "/fleet/v1/requests/r"):
            status, text, _ = await up.get(path)
            assert (status, json.loads(text)["error"]["code"]) == (404, "unknown_path")
        assert (await up.get("/health"))[0] == await asked(up, "/health") == 200
        assert await asked(up, "/metrics") == 200
        assert await asked(up, "/fleet/v1/requests/r") == 401
        assert await asked(up, "/fleet/v1/requests/r", **auth(bearer(TOKEN))) == 200
        for path in ("/v1/models", "/v1/completions", "/", "/metrics/"):
            assert await asked(up, path) == 404


async def test_no_browser_gets_there() -> None:
    async with fleet(*pair(), admin=True) as up:
        assert await asked(up, "/metrics", host="localhost:1") == 200
        for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example"):
            assert await asked(up, "/metrics", host=host) == 403
        assert await asked(up, "/metrics", origin="http://localhost") == 403
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH"):
            for path in ("/metrics", "/health", "/fleet/v1/requests/r"):
                assert await asked(up, path, method) == 405


# Tenants in metrics ------------------------------------------------------------------------------------------------


async def test_tenants_are_counted_and_their_keys_are_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TENANT_LABELS_MAX", 2)
    keys = {name: add_key(tmp_path / "keys", name) for name in ("alice", "bob", "carol", "dave")}
    async with fleet(*pair(), front=front(keys_file=str(tmp_path / "keys"))) as up:
        for name in ("alice", "alice", "bob", "carol", "dave"):
            await up.post({"prompt": "hi"}, **auth(keys[name]))
        await up.post(b"{", **auth(keys["bob"]))
        await up.post({"prompt": "hi"}, **auth("vf-wrong"))
        p = "vllm_fleet_router_tenant"
        await until(lambda: up.metric(f'{p}_requests_total{{tenant="bob"}}') == 2)
        assert up.metric(f'{p}_requests_total{{tenant="alice"}}') == 2
        assert up.metric(f'{p}_errors_total{{tenant="bob"}}') == 1
        assert up.metric(f'{p}_requests_total{{tenant="(others)"}}') == 2
        assert up.metric(f'{p}_request_bytes_total{{tenant="alice"}}') == 2 * len(b'{"prompt": "hi"}')
        assert up.metric(f'{p}_answer_bytes_total{{tenant="alice"}}') > 50
        page = up.router.metrics.text().decode()
        assert 'vllm_fleet_router_requests_total{route="/v1/completions",status="401"} 1.0' in page
        assert not [key for key in keys.values() if key[3:12] in page]


async def test_where_time_goes_and_who_was_chosen() -> None:
    p, d = pair()
    async with fleet(p, d) as up:
        await up.stream({"prompt": "hi"})
        name = "vllm_fleet_router"
        await until(lambda: up.metric(f'{name}_request_seconds_count{{route="/v1/completions"}}') == 1)
        assert up.metric(f'{name}_handoff_seconds_count{{mode="sequential"}}') == 1
        assert 1 <= up.metric(f"{name}_inter_token_seconds_count") <= 2  # the mock writes three parts
        assert up.metric(f'{name}_choices_total{{instance="p",policy="least_load",stage="prefill"}}') == 1
        assert up.metric(f'{name}_choices_total{{instance="d",policy="least_load",stage="decode"}}') == 1


# TLS ---------------------------------------------------------------------------------------------------------------


def certificate(folder: Path, name: str) -> tuple[str, str]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = folder / "cert.pem", folder / "key.pem"
    for file, content in (
        (cert_file, made.public_bytes(serialization.Encoding.PEM)),
        (
            key_file,
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
        ),
    ):
        file.unlink(missing_ok=True)
        file.touch(mode=0o600)
        file.write_bytes(content)
    return str(cert_file), str(key_file)


async def subject(url: str, newest: ssl.TLSVersion | None = None) -> str:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if newest is not None:
        context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        context.maximum_version = newest
    _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]), ssl=context)
    found = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    await writer.wait_closed()
    name = x509.load_der_x509_certificate(found).subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
    assert isinstance(name, str)
    return name


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
async def test_https_and_a_certificate_that_is_renewed(tmp_path: Path) -> None:
    cert_file, key_file = certificate(tmp_path, "old")
    at = front(cert_file=cert_file, key_file=key_file)
    context = ssl.create_default_context(cafile=cert_file)
    async with fleet(*pair(), front=at, admin=True) as up:
        assert up.router.url.startswith("https://")
        assert up.router.admin_url.startswith("http://")
        url = up.router.url.replace("127.0.0.1", "localhost")
        async with up.http.post(f"{url}/v1/completions", json={"prompt": "hi"}, ssl=context) as answer:
            assert answer.status == 200
        with pytest.raises(ssl.SSLError):
            await subject(up.router.url, ssl.TLSVersion.TLSv1_1)
        assert await subject(up.router.url, ssl.TLSVersion.TLSv1_2) == "old"
        certificate(tmp_path, "new")
        await at.refresher.look()
        assert await subject(up.router.url) == "new"
        Path(key_file).write_text("broken")  # noqa: ASYNC240  a small file of this test
        await at.refresher.look()
        assert await subject(up.router.url) == "new"


def test_certificates_that_cannot_be_used(tmp_path: Path) -> None:
    cert_file, key_file = certificate(tmp_path, "a")
    with pytest.raises(ConfigError, match=r"router.tls.cert_file: cannot read /none"):
        tls.server_context("/none", key_file)
    Path(key_file).chmod(0o644)
    with pytest.raises(ConfigError, match=r"router.tls.key_file: .* has mode 644, others could read it"):
        tls.server_context(cert_file, key_file)
    Path(key_file).chmod(0o600)
    (tmp_path / "other").mkdir()
    _, other = certificate(tmp_path / "other", "b")
    with pytest.raises(ConfigError, match="are no certificate and its key"):
        tls.server_context(cert_file, other)
    locked = serialization.load_pem_private_key(Path(key_file).read_bytes(), None).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
    )
    Path(key_file).write_bytes(locked)
    with pytest.raises(ConfigError, match="wants a password"):
        tls.server_context(cert_file, key_file)
