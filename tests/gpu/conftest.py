"""The fixtures of the conformance suite, for what only GPU transports promise."""

from tests.contract.conftest import peers

__all__ = ["peers"]
