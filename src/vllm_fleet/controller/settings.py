"""What the controller is started with: one JSON file, strict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from vllm_fleet.config.etcd import EtcdSettings, check_etcd
from vllm_fleet.controller.state import Rules
from vllm_fleet.core import limits
from vllm_fleet.core.errors import ConfigError
from vllm_fleet.wire.names import Name

Seconds = Annotated[float, Meta(gt=0, le=3600)]


class ControllerSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """One fleet's controller. ``token_file`` and ``state_dir`` are paths; the journal is kept in ``state_dir`` or in an
    etcd.
    """

    fleet: Name
    token_file: str
    state_dir: str = ""
    etcd: EtcdSettings | None = None
    """Given: the journal is kept there, and ``state_dir`` is not used."""
    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 0
    heartbeat_s: Seconds = 0.5
    suspect_s: Seconds = 1.5
    lease_s: Seconds = 10.0

    @property
    def rules(self) -> Rules:
        return Rules(self.heartbeat_s, self.suspect_s, self.lease_s)


def read_settings(path: Path) -> ControllerSettings:
    """The settings in ``path``.

    Raises:
        ConfigError: it cannot be read, or a setting is missing, unknown or wrong.
    """
    try:
        with path.open("rb") as file:
            text = file.read(limits.CONFIG_FILE_BYTES_MAX)
        settings = msgspec.json.decode(text, type=ControllerSettings)
    except OSError as error:
        raise ConfigError(f"--settings: cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--settings: {path}: {error}") from error
    if not settings.heartbeat_s < settings.suspect_s < settings.lease_s:
        raise ConfigError(
            f"--settings: {path}: heartbeat_s ({settings.heartbeat_s}) must be smaller than suspect_s "
            f"({settings.suspect_s}), and that smaller than lease_s ({settings.lease_s})"
        )
    if settings.etcd is None and not settings.state_dir:
        raise ConfigError(f"--settings: {path}: state_dir or etcd must say where the journal is kept")
    if settings.etcd is not None:
        check_etcd(settings.etcd)
    return settings
