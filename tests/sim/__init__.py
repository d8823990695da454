"""Deterministic simulations: one seed decides everything that happens."""
