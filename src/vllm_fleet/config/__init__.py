"""The one frozen FleetConfig tree, and the settings each process is started with."""
