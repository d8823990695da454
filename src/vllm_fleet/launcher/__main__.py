"""The supervisor in the background: ``python -m vllm_fleet.launcher`` with a FleetConfig in JSON on standard input."""

from __future__ import annotations

import sys

from vllm_fleet.config.fleet import FleetConfig
from vllm_fleet.config.load import process_environment
from vllm_fleet.core.errors import ConfigError, FleetError
from vllm_fleet.launcher.record import FleetRecord
from vllm_fleet.launcher.up import up


class Silent:
    """Shows nothing: who is interested reads fleet.json and the log."""

    def show(self, record: FleetRecord) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing: it is in the log."""

    def output(self, name: str, line: str) -> None:
        """Nothing: it is in the process's own log."""

    def ready(self, record: FleetRecord) -> None:
        """Nothing."""


def main() -> int:
    """Run one fleet; the exit code of ``vllm-fleet up``."""
    try:
        config = FleetConfig.model_validate_json(sys.stdin.buffer.read(), strict=True)
        outcome = up(config, process_environment(), Silent())
    except FleetError as error:
        sys.stderr.write(f"{error}\n")
        return 2 if isinstance(error, ConfigError) else 1
    if outcome.code:
        sys.stderr.write(f"{outcome.reason}\n")
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
