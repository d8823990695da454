"""Settings that are right alone and wrong together."""

from __future__ import annotations

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
