"""Where the processes of a fleet run: beside the supervisor, or on the nodes of a Ray cluster."""
