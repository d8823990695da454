"""Kinds of names. Each is a plain string or number at run time and its own type for the checker."""

from __future__ import annotations

from typing import NewType

InstanceName = NewType("InstanceName", str)
"""Name of an instance within its fleet, such as ``prefill-0``; letters, digits and '-'."""

Incarnation = NewType("Incarnation", str)
"""Random id of one life of one process: a restarted instance has another."""

Generation = NewType("Generation", int)
"""Number the controller gives to each registration of a name; later registrations have larger ones."""

Revision = NewType("Revision", int)
"""Number of a change of the fleet's state; each change has the next one."""

TransferId = NewType("TransferId", str)
"""Random id of one handoff; single-use."""

RegionId = NewType("RegionId", int)
"""Index of a registered memory region within its pool."""
