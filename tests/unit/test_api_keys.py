"""API keys: at rest, on the command line, at the router's door; and the salts that keep tenants apart."""

from __future__ import annotations

import re
import stat
from pathlib import Path

import msgspec
import pytest
from msgspec import Raw
from typer.testing import CliRunner

from vllm_fleet.cli.main import app
from vllm_fleet.config.keys import add_key, digest, new_key, parse, read_keys, revoke_key
from vllm_fleet.core import limits
from vllm_fleet.core.errors import BadRequest, ConfigError
from vllm_fleet.router.tenants import Salts, Tenants

# At rest -----------------------------------------------------------------------------------------------------------


def test_a_key_is_256_random_bits_and_is_not_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    key = add_key(file, "alice")
    assert re.fullmatch(r"vf-[A-Za-z0-9_-]{43}", key)
    assert key != new_key()
    text = file.read_text()
    assert key not in text
    assert key[3:] not in text
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert read_keys(file) == {"alice": digest(key.encode())}


def test_names_are_used_once_and_revoked_ones_may_return(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    first = add_key(file, "a")
    add_key(file, "b")
    with pytest.raises(BadRequest, match="a has a key"):
        add_key(file, "a")
    revoke_key(file, "a")
    assert list(read_keys(file)) == ["b"]
    assert add_key(file, "a") != first
    with pytest.raises(BadRequest, match="c has no key"):
        revoke_key(file, "c")


@pytest.mark.parametrize("name", ["", ".x", "a b", "ä", "a\n", "x" * (limits.NAME_LEN_MAX + 1), "a:b", 'a"'])
def test_names_that_cannot_be_labels(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="cannot name a key"):
        add_key(tmp_path / "keys", name)


GOOD = f"a: sha256:{'0' * 64}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("secret", "line 1: expected NAME: sha256:"),
        (f"# comment\n\n{GOOD}\n{GOOD}", "line 4: a is there twice"),
        ("a: sha256:abc", "line 1: expected"),
        (f"a: {'0' * 64}", "line 1: expected"),
        (f"- {GOOD}", "line 1: expected"),
    ],
)
def test_files_that_are_none(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as found:
        parse(text, "f")
    assert "secret" not in str(found.value)


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    with pytest.raises(ConfigError, match=r"^router.keys_file: cannot read .*: No such file"):
        read_keys(file)
    add_key(file, "a")
    file.chmod(0o640)
    with pytest.raises(ConfigError, match=r"has mode 640, others could read it; run: chmod 600"):
        read_keys(file)
    file.chmod(0o600)
    file.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_keys(file)


def test_there_is_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "KEYS_MAX", 1)
    with pytest.raises(ConfigError, match="more than 1 keys"):
        parse(f"{GOOD}\nb{GOOD[1:]}", "f")


# The command -------------------------------------------------------------------------------------------------------


def test_the_commands(tmp_path: Path) -> None:
    run, file = CliRunner(), str(tmp_path / "keys")
    added = run.invoke(app, ["keys", "add", "alice", "--file", file])
    assert added.exit_code == 0
    key = added.stdout.strip()
    assert Tenants(read_keys(file)).of({"authorization": f"Bearer {key}"}) == "alice"
    listed = run.invoke(app, ["keys", "list", "--file", file])
    assert listed.stdout.split() == ["alice"]
    assert run.invoke(app, ["keys", "revoke", "alice", "--file", file]).exit_code == 0
    assert run.invoke(app, ["keys", "list", "--file", file, "--json"]).stdout.strip() == "[]"


def test_the_file_is_found_in_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = CliRunner()
    without = run.invoke(app, ["keys", "list"])
    assert isinstance(without.exception, ConfigError)
    assert "give --file FILE, or set router.keys_file" in str(without.exception)
    (tmp_path / "fleet.yaml").write_text(f"model: m\nrouter: {{keys_file: {tmp_path}/k}}\n")
    assert run.invoke(app, ["keys", "add", "bob"]).exit_code == 0
    assert list(read_keys(tmp_path / "k")) == ["bob"]


# At the door -------------------------------------------------------------------------------------------------------


def test_whose_key_it_is() -> None:
    keys = {"a": digest(b"vf-a"), "b": digest(b"vf-b")}
    tenants = Tenants(keys)
    assert tenants.wanted
    for good in ("Bearer vf-b", "bearer vf-b", "BEARER   vf-b ", "Bearer vf-b"):
        assert tenants.of({"authorization": good}) == "b"
    assert tenants.of({"x-api-key": "vf-a"}) == "a"
    wrong = ["", "Bearer", "Bearer ", "Basic vf-b", "vf-b", "Bearer vf-b,vf-b", "Bearer vf-", "Bearer VF-B", "Bearer é"]
    assert [tenants.of({"authorization": given}) for given in wrong] == [None] * len(wrong)
    assert tenants.of({}) is None
    assert tenants.of({"authorization": f"Bearer {keys['a'].hex()}"}) is None
    tenants.replace({"b": keys["b"]})
    assert tenants.of({"authorization": "Bearer vf-a"}) is None
    assert tenants.of({"authorization": "Bearer vf-b"}) == "b"


def test_no_file_of_keys_lets_everybody_in_and_an_empty_one_nobody() -> None:
    assert not Tenants(None).wanted
    assert Tenants(None).of({"authorization": "Bearer whatever"}) == ""
    assert Tenants({}).of({}) is None
    assert Tenants({}).of({"authorization": "Bearer \0"}) is None


# Salts -------------------------------------------------------------------------------------------------------------


def salted(salts: Salts, tenant: str, given: object = None) -> str:
    fields = {} if given is None else {"cache_salt": Raw(msgspec.json.encode(given))}
    salts.set(fields, tenant)
    made = msgspec.json.decode(fields["cache_salt"], type=str)
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}", made)  # vLLM takes 128 characters without '@', '/', '\' and NUL
    return made


def test_tenants_never_share_a_salt_whatever_they_send() -> None:
    salts = Salts(bytes(32))
    a, b = salted(salts, "a"), salted(salts, "b")
    made = [a, b, salted(salts, "a", b), salted(salts, "b", a), salted(salts, "a", "x"), salted(salts, "b", "x")]
    made += [salted(salts, "ab", "c"), salted(salts, "a", "bc"), salted(salts, "", "a")]
    assert len(set(made)) == len(made)
    assert (salted(salts, "a"), salted(salts, "a", "x")) == (made[0], made[4])  # the same each time
    assert salted(Salts(b"\1" * 32), "a") != a  # of another fleet
    assert salted(salts, "a", None) == a


def test_a_null_is_no_salt() -> None:
    salts, fields = Salts(bytes(32)), {"cache_salt": Raw(b"null")}
    salts.set(fields, "a")
    assert msgspec.json.decode(fields["cache_salt"]) == salted(salts, "a")


@pytest.mark.parametrize(
    "raw", [b"7", b'""', b'{"a":1}', b"[]", b'"a@b"', b'"a/b"', b'"a\\\\b"', b'"a\\u0000"', b'"\xff"']
)
def test_salts_that_vllm_would_refuse_or_die_of(raw: bytes) -> None:
    with pytest.raises(BadRequest, match="cache_salt: must be a string of 1 to 128 characters"):
        Salts(bytes(32)).set({"cache_salt": Raw(raw)}, "a")
    with pytest.raises(BadRequest):
        Salts(bytes(32)).set({"cache_salt": Raw(msgspec.json.encode("x" * 129))}, "a")
