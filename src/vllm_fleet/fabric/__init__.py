"""All that moves bytes between workers: contract, plans, transports, link selection, endpoint."""
