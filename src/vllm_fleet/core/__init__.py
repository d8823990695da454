"""Ids, errors, limits, deadlines, environment and the event log. Standard library only."""
