"""API keys at rest: a file of names and hashes. Who reads the file learns no key.

A key is 256 random bits that we draw ourselves, so one round of SHA-256 protects it as well as any slow hash would:
slow hashes make up for guessable passwords, and nobody guesses among 2**256 keys. Keys that people choose are not taken
for that reason. One round costs a request two microseconds; scrypt would cost it 50 ms of the router's only core.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from vllm_fleet.core import limits
from vllm_fleet.core.errors import BadRequest, ConfigError, FleetError

SETTING = "router.keys_file"
PREFIX = "vf-"
_KEY_BYTES = 32
_SCHEME = "sha256:"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_HASH = re.compile(rf"{_SCHEME}([0-9a-f]{{64}})")
_HEAD = "# API keys of a fleet: `vllm-fleet keys add|list|revoke`. Hashes only: a key that is lost is replaced.\n"


def new_key() -> str:
    """A fresh key; shown once and stored nowhere."""
    return PREFIX + secrets.token_urlsafe(_KEY_BYTES)


def digest(key: bytes) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key).digest()


def parse(text: str, where: str) -> dict[str, bytes]:
    """Name -> digest; lines ``NAME: sha256:HEX``, empty ones and comments.

    Raises:
        ConfigError: names ``where`` and the line, never what it holds.
    """
    found: dict[str, bytes] = {}
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        name, _, value = (part.strip() for part in stripped.partition(":"))
        known = _HASH.fullmatch(value)
        if not is_name(name) or known is None:
            raise ConfigError(
                f"{where}, line {number}: expected NAME: {_SCHEME} and 64 hexadecimal digits; "
                "make lines with: vllm-fleet keys add NAME"
            )
        if name in found:
            raise ConfigError(f"{where}, line {number}: {name} is there twice")
        if len(found) >= limits.KEYS_MAX:
            raise ConfigError(f"{where}: more than {limits.KEYS_MAX} keys")
        found[name] = bytes.fromhex(known[1])
    return found


def is_name(name: str) -> bool:
    """Whether a key may have this name: it is a label of metrics and stands in logs."""
    return len(name) <= limits.NAME_LEN_MAX and _NAME.fullmatch(name) is not None


def read_keys(path: str | Path, setting: str = SETTING) -> dict[str, bytes]:
    """The keys in a file.

    Raises:
        ConfigError: the file is missing, open to other users, or something else than keys.
    """
    file = Path(path)
    try:
        with file.open("rb") as stream:
            mode = os.fstat(stream.fileno()).st_mode & 0o777
            raw = stream.read(limits.KEYS_FILE_BYTES_MAX + 1)
        text = raw.decode()
    except OSError as error:
        raise ConfigError(f"{setting}: cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{setting}: {file} is not UTF-8 text (byte {error.start})") from error
    if mode & 0o077:
        raise ConfigError(f"{setting}: {file} has mode {mode:03o}, others could read it; run: chmod 600 {file}")
    if len(raw) > limits.KEYS_FILE_BYTES_MAX:
        raise ConfigError(f"{setting}: {file} is larger than {limits.KEYS_FILE_BYTES_MAX} bytes; is it the right file?")
    return parse(text, f"{setting}: {file}")


def add_key(file: Path, name: str) -> str:
    """Draw a key for ``name``, keep its hash in ``file`` (made if it is not there), and return the key.

    Raises:
        BadRequest: the name cannot be used, or has a key.
    """
    if not is_name(name):
        raise BadRequest(
            f"{name!r} cannot name a key: letters, digits, '.', '_' and '-', at most {limits.NAME_LEN_MAX} characters"
        )
    key = new_key()
    with _changing(file) as keys:
        if name in keys:
            raise BadRequest(f"{name} has a key; revoke it first, or choose another name")
        keys[name] = digest(key.encode())
        _write(file, keys)
    return key


def revoke_key(file: Path, name: str) -> None:
    """Forget the key of ``name``. BadRequest when it has none."""
    with _changing(file) as keys:
        if keys.pop(name, None) is None:
            raise BadRequest(f"{name} has no key in {file}")
        _write(file, keys)


@contextlib.contextmanager
def _changing(file: Path) -> Iterator[dict[str, bytes]]:
    """The keys now; nobody else changes them inside the block."""
    try:
        folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise FleetError(f"cannot use the folder {file.parent}: {error.strerror}") from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # the file itself is replaced, so it cannot be what is locked
        yield read_keys(file, "keys") if file.exists() else {}
        os.fsync(folder)
    finally:
        os.close(folder)


def _write(file: Path, keys: Mapping[str, bytes]) -> None:
    lines = [f"{name}: {_SCHEME}{kept.hex()}\n" for name, kept in sorted(keys.items())]
    try:
        handle, made = tempfile.mkstemp(dir=file.parent, prefix=".keys-")  # mode 0600
        try:
            with open(handle, "w", encoding="utf-8") as stream:
                stream.write(_HEAD + "".join(lines))
                stream.flush()
                os.fsync(handle)
            os.replace(made, file)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(made)
            raise
    except OSError as error:
        raise FleetError(f"cannot write {file}: {error.strerror}") from error
