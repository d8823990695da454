"""ProcessSpec: one process of a fleet, described before it exists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["controller", "router", "instance"]


@dataclass(frozen=True)
class ProcessSpec:
    """How to start one process, and how to tell that it answers."""

    name: str
    kind: Kind
    role: str
    """``prefill``, ``decode`` or ``both`` for instances; the kind's own name for the others."""
    argv: tuple[str, ...]
    url: str
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the environment of the launcher."""
    settings: Mapping[str, Any] | None = None
    """Content of ``settings_file``, written before the start; None: it has none."""
    settings_file: str | None = None
    tmp: str | None = None
    """Its own folder for temporary files, removed after its death."""
    needs: Mapping[str, float] | None = None
    """Resources it holds on a node of the cluster; None: it runs beside the supervisor. Words of ``hosts.late`` in
    ``argv``, ``env``, ``url`` and ``tmp`` are replaced where it runs."""
    sides: int = 0
    """On a cluster: consecutive ports beside its own."""
    admin_url: str | None = None
    """Where it answers its operators; None: at ``url``, like everybody."""
    fingerprint: Mapping[str, str] | None = None
    """For instances that the supervisor registers with the controller: what to say; None: they register themselves."""

    @property
    def health_url(self) -> str:
        """Answers 200 to GET when the process is ready."""
        return f"{self.admin_url or self.url}/health"
