"""Load, correctness and fabric benchmarks; their JSON holds the facts of the machine."""
