"""Settings that are right alone and wrong together."""

from __future__ import annotations

import msgspec

from vllm_fleet.config.etcd import EtcdSettings, check_etcd
from vllm_fleet.config.fleet import FleetConfig
from vllm_fleet.core import limits
from vllm_fleet.core.errors import ConfigError


def check_faults(config: FleetConfig) -> None:
    """ConfigError for a rehearsal whose wrong bytes could reach an answer."""
    lies = [kind for kind in config.fabric.faults.kinds if kind in ("truncate", "corrupt")]
    if lies and config.fabric.checksums != "full":
        raise ConfigError(
            f"fabric.faults.kinds: {lies[0]} claims success, and only fabric.checksums: full finds each of them; "
            "set that, or leave it out"
        )


def check_counts(config: FleetConfig) -> None:
    """ConfigError for counts of instances that make no fleet."""
    total = config.prefill + config.decode + config.both
    if total == 0:
        raise ConfigError("prefill, decode and both are all 0: a fleet needs at least one instance")
    if config.prefill and not config.decode:
        raise ConfigError(
            f"prefill is {config.prefill} but decode is 0: nobody would take over from the prefill instances; "
            "set decode to at least 1, or use 'both' instead of prefill"
        )
    if total > limits.INSTANCES_MAX:
        raise ConfigError(f"prefill + decode + both is {total}; one fleet has at most {limits.INSTANCES_MAX} instances")


def check_store(config: FleetConfig) -> None:
    """ConfigError for controllers that could not share a journal, or an etcd that cannot be used like this."""
    part = config.controller
    if part.store == "embedded":
        if part.replicas > 1:
            raise ConfigError(
                f"controller.replicas is {part.replicas}, but controllers can share a journal only in an etcd; "
                "set controller.store: etcd, or controller.replicas: 1"
            )
        return
    for name in ("credentials_file", "ca_file", "cert_file", "key_file"):
        file = getattr(part.etcd, name)
        if file is not None and not file.startswith("/"):
            raise ConfigError(f"controller.etcd.{name}: must be an absolute path, found {file!r}")
    check_etcd(etcd_settings(config), "controller.etcd")


def etcd_settings(config: FleetConfig) -> EtcdSettings:
    """What the controllers are told of the etcd. ConfigError says what is wrong with an endpoint."""
    try:
        return msgspec.convert(config.controller.etcd.model_dump(), EtcdSettings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"controller.etcd: {error}; an endpoint is http://HOST:PORT or https://HOST:PORT") from error
