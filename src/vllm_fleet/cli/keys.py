"""``vllm-fleet keys``: the API keys of a fleet's clients."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from vllm_fleet.config import keys
from vllm_fleet.config.load import DEFAULT_FILE, process_environment, read_yaml
from vllm_fleet.core.errors import ConfigError

_VARIABLE = "FLEET_ROUTER__KEYS_FILE"


def add(file: Path | None, config: Path | None, name: str) -> None:
    """Print a new key, once: nobody can show it again."""
    where = _file(file, config)
    key = keys.add_key(where, name)
    typer.secho(f"key of {name}, kept as a hash in {where}; it is shown only now:", err=True)
    typer.echo(key)


def revoke(file: Path | None, config: Path | None, name: str) -> None:
    """Forget a key."""
    keys.revoke_key(_file(file, config), name)
    typer.secho(f"the key of {name} is good for nothing within a second", err=True)


def show(file: Path | None, config: Path | None, *, as_json: bool) -> None:
    """Print the names."""
    names = sorted(keys.read_keys(_file(file, config), "keys"))
    typer.echo(json.dumps(names) if as_json else "\n".join(names) or "no keys")


def _file(file: Path | None, config: Path | None) -> Path:
    """--file, else what the configuration says. The rest of that need not be complete, or right."""
    if file is not None:
        return file
    named: object = process_environment().get(_VARIABLE)
    if named is None:
        if config is None and Path(DEFAULT_FILE).exists():
            config = Path(DEFAULT_FILE)
        router = read_yaml(config).get("router") if config is not None else None
        named = router.get("keys_file") if isinstance(router, dict) else None
    if not isinstance(named, str):
        raise ConfigError("give --file FILE, or set router.keys_file in fleet.yaml")
    return Path(named)
